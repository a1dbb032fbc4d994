//! Finds servers of OpenAI's API and makes models of the network of theirs.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Context as _;
use engine::remote::dialect::Listed;
use engine::remote::{RemoteRuntime, ServerAddress, Survey};
use futures_util::future::join_all;
use protocol::ModelName;
use protocol::model::ModelKey;
use tokio::time::sleep;
use tracing::{info, warn};
use worker::{RemoteServer, ServedModel};

use crate::model_names;
use crate::settings::Settings;

/// Where servers listen unless they are told otherwise: Ollama, LM Studio, vLLM, SGLang, and llama-server twice.
const PORTS: [u16; 6] = [11_434, 1_234, 8_000, 30_000, 8_080, 8_081];
/// How long a server of this machine may take for each of its answers.
const HERE_WITHIN: Duration = Duration::from_millis(500);
/// How long any other may take.
const ELSEWHERE_WITHIN: Duration = Duration::from_secs(5);
/// How long to wait before the search is repeated that found nothing.
const AGAIN_EVERY: Duration = Duration::from_secs(5);

/// Servers that are to be adopted.
pub struct Adoption {
    servers: Vec<ServerAddress>,
    within: Duration,
    runtime: RemoteRuntime,
}

impl Adoption {
    /// Returns what the settings want adopted; nothing where they want no server.
    pub fn of(settings: &Settings) -> anyhow::Result<Option<Self>> {
        let Some(urls) = &settings.adopt else { return Ok(None) };
        let searched: Vec<String> = PORTS.map(|port| format!("http://127.0.0.1:{port}")).into();
        let (urls, within) = if urls.is_empty() { (&searched, HERE_WITHIN) } else { (urls, ELSEWHERE_WITHIN) };
        let servers =
            urls.iter().map(|url| ServerAddress::new(url, None).with_context(|| format!("{url} cannot be adopted")));
        Ok(Some(Self { servers: servers.collect::<Result<_, _>>()?, within, runtime: RemoteRuntime::default() }))
    }

    /// Says where it looks.
    pub fn places(&self) -> String {
        self.servers.iter().map(ServerAddress::as_str).collect::<Vec<_>>().join(", ")
    }

    /// Returns the models of the servers that answer now, without those whose name another served model has.
    pub async fn look(&self, served: &[ServedModel]) -> Vec<ServedModel> {
        let surveys = self.servers.iter().map(|address| self.runtime.survey(address, self.within));
        let surveys = join_all(surveys).await;
        let found: Vec<_> =
            self.servers.iter().zip(surveys).filter_map(|(at, survey)| Some((at, survey.ok()?))).collect();
        models(&found, served.iter().map(|model| model.model_id.clone()).collect())
    }

    /// Looks again and again, until there is at least one model.
    pub async fn wait(&self, served: &[ServedModel]) -> Vec<ServedModel> {
        warn!(at = self.places(), "no server to adopt answers, or none has a model; looking again every 5 s");
        loop {
            sleep(AGAIN_EVERY).await;
            let models = self.look(served).await;
            if !models.is_empty() {
                return models;
            }
        }
    }
}

/// Adds the models of the servers that the settings want adopted. Waits until there is at least one.
pub async fn adopt(settings: &mut Settings) -> anyhow::Result<()> {
    let Some(adoption) = Adoption::of(settings)? else { return Ok(()) };
    let served = &mut settings.worker.models;
    let mut models = adoption.look(served).await;
    if models.is_empty() {
        models = adoption.wait(served).await;
    }
    served.extend(models);
    Ok(())
}

/// Names the models of servers, and leaves out those whose name is taken or that are not in memory.
fn models(found: &[(&ServerAddress, Survey)], mut taken: BTreeSet<ModelName>) -> Vec<ServedModel> {
    let mut models = vec![];
    for (address, survey) in found {
        for listed in survey.models.iter().filter(|listed| listed.is_loaded) {
            let (server, model) = (address.as_str(), &listed.name);
            match model_names::of(model) {
                Some(name) if taken.insert(name.clone()) => {
                    info!(server, dialect = survey.dialect.as_str(), model, %name, "adopted");
                    models.push(served(address, listed, name));
                }
                Some(name) => warn!(server, model, %name, "not adopted: another model has this name already"),
                None => warn!(server, model, "not adopted: no name can be made of the model's"),
            }
        }
    }
    models
}

fn served(address: &ServerAddress, listed: &Listed, model_id: ModelName) -> ServedModel {
    let base_url = address.as_str().to_owned();
    let key = ModelKey { model_id, version: "1.0".parse().expect("a well-formed version") };
    ServedModel::on_server(key, RemoteServer { base_url, model: listed.name.clone(), api_key_file: None })
}

#[cfg(test)]
mod tests {
    use engine::remote::dialect::{Dialect, Kind};

    use super::*;

    fn survey(names: &[&str]) -> Survey {
        let listed = |name: &&str| Listed {
            name: (*name).to_owned(),
            context_length: None,
            kind: Kind::Unknown,
            is_loaded: !name.ends_with("cold"),
        };
        Survey { dialect: Dialect::Other, models: names.iter().map(listed).collect() }
    }

    #[test]
    fn a_taken_name_is_not_given_twice_and_only_loaded_models_are_adopted() {
        let address = ServerAddress::new("http://127.0.0.1:1234/v1", None).expect("an address");
        let found = [(&address, survey(&["org/m", "other/M", "tether-tiny", "n-cold"]))];
        let taken = BTreeSet::from(["tether-tiny".parse().expect("a name")]);
        let models = models(&found, taken);
        let remote =
            RemoteServer { base_url: "http://127.0.0.1:1234".into(), model: "org/m".into(), api_key_file: None };
        assert_eq!(models.iter().map(|model| model.model_id.as_str()).collect::<Vec<_>>(), ["m"]);
        assert_eq!(models[0].remote, Some(remote));
    }
}
