//! The flags that a node was started with, saved in its folder. After a power cut, the command of its role without
//! flags, or `tether start`, restarts it as it was.

use std::fs;
use std::io;
use std::path::PathBuf;

use anyhow::Context as _;
use rpc::identity;
use toml::{Table, Value};

use crate::data_folder::DataFolder;
use crate::settings::Flag;

/// The flags that one node of a data folder was started with, as settings.
#[derive(Debug, Clone, PartialEq)]
pub struct KeptFlags {
    path: PathBuf,
    role: String,
    settings: Table,
}

impl KeptFlags {
    /// Reads the flags saved for a role. A node that was never started has none saved.
    pub fn read(data: &DataFolder, role: &str) -> anyhow::Result<Self> {
        let path = data.kept_flags(role);
        let settings = match fs::read_to_string(&path) {
            Ok(text) => toml::from_str(&text)
                .with_context(|| format!("{} is damaged; delete it and give the flags again", path.display()))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Table::new(),
            Err(error) => return Err(error).with_context(|| format!("could not read {}", path.display())),
        };
        Ok(Self { path, role: role.to_owned(), settings })
    }

    /// Replaces saved flags by those that were given again.
    pub fn replace(&mut self, flags: &[Flag]) -> anyhow::Result<()> {
        for (name, value) in flags {
            let value: Value = value.clone().try_deserialize().context("a flag cannot be kept")?;
            let mut table = &mut self.settings;
            let mut names = name.split('.').peekable();
            while let Some(name) = names.next() {
                if names.peek().is_none() {
                    table.insert(name.to_owned(), value);
                    break;
                }
                let inner = table.entry(name).or_insert_with(|| Value::Table(Table::new()));
                table = inner.as_table_mut().with_context(|| format!("{} is damaged", self.path.display()))?;
            }
        }
        Ok(())
    }

    /// Returns the flags as a settings file.
    pub fn to_toml(&self) -> String {
        self.settings.to_string()
    }

    /// Saves the flags atomically.
    pub fn write(&self) -> anyhow::Result<()> {
        let text = format!(
            "# The flags that `tether {}` was started with. A flag that is given again replaces its line here; delete a line\n\
             # to go back to the settings file.\n{}",
            self.role,
            self.to_toml()
        );
        identity::replace_private(&self.path, text.as_bytes())
            .with_context(|| format!("could not write {}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_kept_and_those_given_again_replace_theirs() {
        let folder = tempfile::tempdir().expect("a folder");
        let data = DataFolder::at(folder.path());
        let mut kept = KeptFlags::read(&data, "worker").expect("nothing yet");
        let bootstrap = vec!["192.0.2.1:49737".to_owned()];
        kept.replace(&[
            ("region", "garage".into()),
            ("network.listen", "0.0.0.0:0".into()),
            ("network.bootstrap", bootstrap.clone().into()),
            ("adopt", Vec::<String>::new().into()),
        ])
        .expect("kept");
        kept.write().expect("written");

        let mut again = KeptFlags::read(&data, "worker").expect("read");
        assert_eq!(again, kept);
        again.replace(&[("region", "attic".into())]).expect("replaced");
        let settings: Table = toml::from_str(&again.to_toml()).expect("TOML");
        assert_eq!(settings["region"].as_str(), Some("attic"));
        assert_eq!(settings["network"]["listen"].as_str(), Some("0.0.0.0:0"));
        assert_eq!(settings["network"]["bootstrap"].as_array().map(Vec::len), Some(bootstrap.len()));
        assert_eq!(settings["adopt"].as_array().map(Vec::len), Some(0));
        assert_eq!(KeptFlags::read(&data, "gateway").expect("another role's").to_toml(), "");
    }

    #[test]
    fn a_damaged_file_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let data = DataFolder::at(folder.path());
        identity::replace_private(&data.kept_flags("worker"), b"region = ").expect("written");
        let error = format!("{:#}", KeptFlags::read(&data, "worker").expect_err("damaged"));
        assert!(error.contains("worker.toml"), "{error}");
    }
}
