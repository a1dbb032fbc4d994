//! The schemas in `docs/schemas` are the ones the code makes.

use std::path::Path;

#[test]
fn the_published_schemas_are_those_of_the_code() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/schemas");
    for (name, schema) in tether_protocol::schema::published() {
        let made = serde_json::to_string_pretty(&schema).expect("a schema is JSON") + "\n";
        let path = folder.join(name);
        if std::env::var_os("UPDATE_SCHEMAS").is_some() {
            std::fs::write(&path, &made).expect("the folder exists");
        }
        let kept = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(kept == made, "{name} is out of date: run UPDATE_SCHEMAS=1 cargo test -p tether-protocol");
    }
}
