//! Finds markers in text that may still grow.

/// Whether a text is a marker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Search {
    /// A marker of this length begins here.
    Found { at: usize, length: usize },
    /// No marker begins before this place, whatever comes.
    Safe(usize),
}

/// Finds the first of some markers.
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

/// Returns the length of the longest end of a text that a marker begins with.
fn overlap(text: &str, marker: &str) -> usize {
    let most = text.len().min(marker.len().saturating_sub(1));
    (1..=most).rev().find(|length| text.as_bytes().ends_with(&marker.as_bytes()[..*length])).unwrap_or(0)
}
