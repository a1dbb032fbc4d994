//! Finds markers in text that may still grow.

/// The result of a search for markers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Search {
    /// A marker of this length begins at `at`.
    Found { at: usize, length: usize },
    /// No marker begins before this offset, whatever text follows.
    Safe(usize),
}

/// Finds the first of several markers.
pub(super) fn find(text: &str, markers: &[&str], at_end: bool) -> Search {
    let places = markers.iter().filter_map(|marker| Some((text.find(marker)?, marker.len())));
    if let Some((at, length)) = places.min() {
        return Search::Found { at, length };
    }
    if at_end {
        return Search::Safe(text.len());
    }
    let held = markers.iter().map(|marker| overlap(text, marker)).max().unwrap_or(0);
    Search::Safe(text.len() - held)
}

/// Returns the length of the longest suffix of the text that is a prefix of the marker.
fn overlap(text: &str, marker: &str) -> usize {
    let most = text.len().min(marker.len().saturating_sub(1));
    (1..=most).rev().find(|length| text.as_bytes().ends_with(&marker.as_bytes()[..*length])).unwrap_or(0)
}
