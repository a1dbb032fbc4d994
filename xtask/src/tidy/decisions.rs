//! The table of `docs/adr` lists every decision, numbered without gaps.

use std::collections::BTreeMap;

use super::SourceFile;

const TABLE: &str = "docs/adr/README.md";

/// Finds numbers without a row, rows with a missing page, and pages that no row links to.
pub(crate) fn check(files: &[SourceFile]) -> Vec<String> {
    let Some(table) = files.iter().find(|file| file.path == TABLE) else {
        return vec![format!("{TABLE} is missing")];
    };
    let rows: BTreeMap<u32, Option<&str>> = table.text.lines().filter_map(row).collect();
    let pages =
        || files.iter().filter_map(|file| file.path.strip_prefix("docs/adr/")).filter(|name| *name != "README.md");
    let gaps = (1..=rows.keys().copied().max().unwrap_or(0)).filter(|number| !rows.contains_key(number));
    let gaps = gaps.map(|number| format!("{TABLE}: number {number:04} has no row; say there what became of it"));
    let missing = rows.values().flatten().filter(|page| !pages().any(|name| name == **page));
    let missing = missing.map(|page| format!("{TABLE}: the page {page} is missing"));
    let unlisted = pages().filter(|name| !rows.values().flatten().any(|page| page == name));
    let unlisted = unlisted.map(|name| format!("{TABLE}: no row links to {name}"));
    gaps.chain(missing).chain(unlisted).collect()
}

/// Reads `| [NNNN](PAGE) | …`, or `| NNNN | …` for a number without a page.
fn row(line: &str) -> Option<(u32, Option<&str>)> {
    let cell = line.strip_prefix("| ")?.split(" |").next()?;
    match cell.strip_prefix('[').and_then(|cell| cell.split_once("](")) {
        Some((number, page)) => Some((number.parse().ok()?, page.strip_suffix(')'))),
        None => Some((cell.parse().ok()?, None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(rows: &str, pages: &[&str]) -> Vec<String> {
        let pages = pages.iter().map(|page| SourceFile { path: format!("docs/adr/{page}"), text: String::new() });
        let table = SourceFile { path: TABLE.into(), text: format!("| | Decision | Status |\n|---|---|---|\n{rows}") };
        check(&pages.chain([table]).collect::<Vec<_>>())
    }

    #[test]
    fn numbers_have_no_gaps_and_rows_have_pages() {
        let good =
            "| [0001](0001-a.md) | A | accepted |\n| 0002 | Never used | |\n| [0003](0003-c.md) | C | accepted |\n";
        assert_eq!(findings(good, &["0001-a.md", "0003-c.md"]), Vec::<String>::new());
        assert!(findings(good, &["0001-a.md"])[0].ends_with("the page 0003-c.md is missing"));
        assert!(findings(good, &["0001-a.md", "0003-c.md", "0004-d.md"])[0].ends_with("links to 0004-d.md"));
        let gap = "| [0001](0001-a.md) | A | accepted |\n| [0003](0003-c.md) | C | accepted |\n";
        assert!(findings(gap, &["0001-a.md", "0003-c.md"])[0].contains("0002 has no row"));
    }
}
