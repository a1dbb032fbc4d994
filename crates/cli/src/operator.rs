//! Routes operators' commands: to a gateway over HTTP, to the registry by RPC, or to its store while no registry runs.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use metadata_store::RegistryStore;
use protocol::control::{
    ALIAS_REMOVE, ALIAS_SET, AliasList, AliasRemove, AliasRemoved, AliasSet, ByOperator, Catalog, INVITE_CREATE,
    InviteCreate, InviteCreated, MODEL_ADD, MODEL_KEEP, MODEL_REMOVE, Member, Members, ModelAdd, ModelKeep,
    ModelRemove, ModelRemoved, NODE_LIST, NODE_RENAME, NODE_REVOKE, NodeList, NodeRename, NodeRenamed, NodeRevoke,
    NodeRevoked, OPERATOR_CATALOG_LIST, OPERATOR_POLICY_GET, OPERATOR_POLICY_LIST, OPERATOR_POLICY_SET,
    OPERATOR_TOKEN_CREATE, OPERATOR_TOKEN_LIST, OPERATOR_TOKEN_REVOKE, OperatorRequest, PolicyRequest, TokenCreate,
    TokenCreated, TokenInfo, TokenList, TokenRevoke, TokenRevoked,
};
use protocol::model::{AliasEntry, ModelEntry, ModelKey, ModelRef};
use protocol::policy::{PolicyList, PolicySaved, PolicySet, TenantPolicy};
use protocol::signature::NodeKey;
use protocol::{Clock as _, ModelName, PublicKey, TenantId, UnixMillis};
use registry::{TokenIssuer, catalog, models, policies};
use rpc::transport::hyperswarm::{HyperswarmTransport, KnownPeers, Options};
use rpc::{CallError, Client, SystemClock};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::args::ServerArgs;
use crate::client::{GatewayClient, Presence};
use crate::data_folder::DataFolder;
use crate::services::open_registry_store;
use crate::settings::{Env, Settings};

/// The fewest digits of a key that may stand for it.
const PREFIX_MIN: usize = 4;
/// Timeout for a registry's response, including the connection to it.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);

/// RPC client of a network's registry.
pub struct Operator {
    /// The API key to authenticate with.
    pub token: String,
    registry: PublicKey,
    client: Client,
    network: Arc<HyperswarmTransport>,
}

/// The target of an operator's commands.
pub enum AdminClient {
    /// A gateway, which forwards them to the registry.
    Gateway(GatewayClient),
    /// The registry, from a machine that belongs to its network.
    Registry(Operator),
    /// The registry's own store, while no registry runs.
    Store(TokenIssuer, Arc<dyn RegistryStore>),
}

impl AdminClient {
    /// Returns the target for commands about keys and models: the gateway that is named or runs here, else the
    /// network's registry, else the store.
    pub async fn of_registry(
        server: &ServerArgs,
        settings: &Settings,
        data: &DataFolder,
        env: &Env,
    ) -> anyhow::Result<Self> {
        let client = GatewayClient::find(server, settings, data, env)?;
        if server.url.is_some() || responds(&client).await? {
            return Ok(Self::Gateway(client));
        }
        // A store that no registry has locked can be opened. This is the way back for operators who lost their last
        // key.
        let is_free = || data.registry_store().exists() && data.lock(&["registry"]).is_ok();
        if data.pool()?.is_some() && !is_free() {
            return Operator::find(server, settings, data, env).await.map(Self::Registry);
        }
        data.create()?;
        let store = open_registry_store(&data.registry_store()).context("could not open the registry's store")?;
        let tokens = TokenIssuer::new(store.clone(), Arc::new(SystemClock), data.pepper()?);
        Ok(Self::Store(tokens, store))
    }

    /// Returns the target for commands about nodes: the gateway that is named, else the registry of this folder's
    /// network, else the gateway that runs here.
    pub async fn of_nodes(
        server: &ServerArgs,
        settings: &Settings,
        data: &DataFolder,
        env: &Env,
    ) -> anyhow::Result<Self> {
        if server.url.is_none() && data.pool()?.is_some() {
            return Operator::find(server, settings, data, env).await.map(Self::Registry);
        }
        let client = GatewayClient::find(server, settings, data, env)?;
        if server.url.is_some() || responds(&client).await? {
            return Ok(Self::Gateway(client));
        }
        bail!(
            "{} belongs to no network of processes; start one with `tether registry`, or name a gateway with --url",
            data.path().display()
        )
    }

    pub async fn create_token(&self, new: TokenCreate) -> anyhow::Result<TokenCreated> {
        match self {
            Self::Gateway(client) => client.post("/admin/v1/tokens", &new).await,
            Self::Registry(operator) => {
                let operation = ByOperator { token: operator.token.clone(), request: new };
                operator.ask(OPERATOR_TOKEN_CREATE, &operation).await
            }
            Self::Store(tokens, _) => Ok(tokens.issue(new).await?),
        }
    }

    pub async fn tokens(&self) -> anyhow::Result<Vec<TokenInfo>> {
        let TokenList { tokens } = match self {
            Self::Gateway(client) => client.get("/admin/v1/tokens").await?,
            Self::Registry(operator) => operator.ask(OPERATOR_TOKEN_LIST, &operator.request()).await?,
            Self::Store(tokens, _) => tokens.list().await?,
        };
        Ok(tokens)
    }

    /// Revokes a key. `key_id` must be well formed: it becomes part of a path.
    pub async fn revoke_token(&self, key_id: &str) -> anyhow::Result<TokenRevoked> {
        match self {
            Self::Gateway(client) => client.delete(&format!("/admin/v1/tokens/{key_id}")).await,
            Self::Registry(operator) => {
                let request = TokenRevoke { key_id: key_id.to_owned() };
                operator.ask(OPERATOR_TOKEN_REVOKE, &ByOperator { token: operator.token.clone(), request }).await
            }
            Self::Store(tokens, _) => Ok(tokens.revoke(key_id).await?),
        }
    }

    /// Lists the models and their aliases. A gateway's answer has no adapters.
    pub async fn catalog(&self) -> anyhow::Result<Catalog> {
        match self {
            Self::Gateway(client) => {
                let listed: Value = client.get("/admin/v1/models").await?;
                let AliasList { aliases } = client.get("/admin/v1/aliases").await?;
                Ok(Catalog { aliases, ..Self::catalog_of_list(&listed) })
            }
            Self::Registry(operator) => operator.ask(OPERATOR_CATALOG_LIST, &operator.request()).await,
            Self::Store(_, store) => Ok(catalog::list(&**store).await?),
        }
    }

    /// Returns the models and aliases in a gateway's list.
    pub fn catalog_of_list(listed: &Value) -> Catalog {
        let rows = || listed["data"].as_array().into_iter().flatten();
        let aliases = rows().filter_map(|row| {
            let (alias, target) = (row["id"].as_str()?.parse().ok()?, row["alias_of"].as_str()?.parse().ok()?);
            let others = row["alternatives"].as_array().into_iter().flatten();
            let alternatives = others.filter_map(|other| other.as_str()?.parse().ok()).collect();
            Some(AliasEntry { alias, target, alternatives, created_at: UnixMillis(0) })
        });
        Catalog { models: rows().filter_map(entry_of).collect(), adapters: vec![], aliases: aliases.collect() }
    }

    pub async fn add_model(&self, new: ModelAdd) -> anyhow::Result<ModelEntry> {
        match self {
            Self::Gateway(client) => client.post("/admin/v1/models", &new).await,
            Self::Registry(operator) => operator.ask(MODEL_ADD, &operator.asking(new)).await,
            Self::Store(_, store) => Ok(models::add(&**store, new, SystemClock.now()).await?),
        }
    }

    pub async fn remove_model(&self, old: ModelRemove) -> anyhow::Result<ModelRemoved> {
        match self {
            Self::Gateway(client) => {
                let ModelRemove { model_id: name, version, force } = old;
                let model = ModelRef { name, version, adapter: None };
                client.delete(&format!("/admin/v1/models/{model}?force={force}")).await
            }
            Self::Registry(operator) => operator.ask(MODEL_REMOVE, &operator.asking(old)).await,
            Self::Store(_, store) => Ok(models::remove(&**store, old).await?),
        }
    }

    /// Sets how long workers keep a model in memory.
    pub async fn keep_model(&self, change: ModelKeep) -> anyhow::Result<ModelEntry> {
        match self {
            Self::Gateway(client) => {
                let ModelKeep { model_id: name, version, pin, keep_alive_secs } = change;
                let model = ModelRef { name, version, adapter: None };
                let change = json!({ "pin": pin, "keepAliveSecs": keep_alive_secs });
                client.post(&format!("/admin/v1/models/{model}/keep"), &change).await
            }
            Self::Registry(operator) => operator.ask(MODEL_KEEP, &operator.asking(change)).await,
            Self::Store(_, store) => Ok(models::keep(&**store, change).await?),
        }
    }

    /// Sets an alias of a model.
    pub async fn set_alias(&self, new: AliasSet) -> anyhow::Result<AliasEntry> {
        match self {
            Self::Gateway(client) => client.post("/admin/v1/aliases", &new).await,
            Self::Registry(operator) => operator.ask(ALIAS_SET, &operator.asking(new)).await,
            Self::Store(_, store) => Ok(models::set_alias(&**store, new, SystemClock.now()).await?),
        }
    }

    pub async fn remove_alias(&self, alias: ModelName) -> anyhow::Result<AliasRemoved> {
        match self {
            Self::Gateway(client) => client.delete(&format!("/admin/v1/aliases/{alias}")).await,
            Self::Registry(operator) => operator.ask(ALIAS_REMOVE, &operator.asking(AliasRemove { alias })).await,
            Self::Store(_, store) => Ok(models::remove_alias(&**store, &alias).await?),
        }
    }

    pub async fn policy(&self, tenant_id: &TenantId) -> anyhow::Result<TenantPolicy> {
        match self {
            Self::Gateway(client) => client.get(&format!("/admin/v1/tenants/{tenant_id}/policy")).await,
            Self::Registry(operator) => {
                let request = PolicyRequest { tenant_id: tenant_id.clone() };
                operator.ask(OPERATOR_POLICY_GET, &operator.asking(request)).await
            }
            Self::Store(_, store) => Ok(policies::of(&**store, tenant_id).await?),
        }
    }

    /// Sets the whole policy of a tenant.
    pub async fn set_policy(&self, new: PolicySet) -> anyhow::Result<PolicySaved> {
        match self {
            Self::Gateway(client) => {
                client.put(&format!("/admin/v1/tenants/{}/policy", new.tenant_id), &new.policy).await
            }
            Self::Registry(operator) => operator.ask(OPERATOR_POLICY_SET, &operator.asking(new)).await,
            Self::Store(_, store) => Ok(policies::set(&**store, new).await?),
        }
    }

    pub async fn policies(&self) -> anyhow::Result<PolicyList> {
        match self {
            Self::Gateway(client) => client.get("/admin/v1/policies").await,
            Self::Registry(operator) => operator.ask(OPERATOR_POLICY_LIST, &operator.request()).await,
            Self::Store(_, store) => Ok(policies::list(&**store).await?),
        }
    }

    /// Lists every node that was ever admitted.
    pub async fn members(&self) -> anyhow::Result<Vec<Member>> {
        match self {
            Self::Gateway(client) => Ok(client.get::<Members>("/admin/v1/members").await?.members),
            Self::Registry(operator) => {
                let NodeList { nodes } = operator.ask(NODE_LIST, &operator.request()).await?;
                Ok(nodes.into_iter().map(|node| Member { node, answers: None }).collect())
            }
            Self::Store(..) => bail!("no registry runs"),
        }
    }

    pub async fn invite(&self, new: InviteCreate) -> anyhow::Result<InviteCreated> {
        match self {
            Self::Gateway(client) => client.post("/admin/v1/invites", &new).await,
            Self::Registry(operator) => {
                operator.ask(INVITE_CREATE, &InviteCreate { token: operator.token.clone(), ..new }).await
            }
            Self::Store(..) => bail!("no registry runs"),
        }
    }

    /// Removes a node from the network.
    pub async fn revoke_node(&self, public_key: PublicKey) -> anyhow::Result<NodeRevoked> {
        match self {
            Self::Gateway(client) => client.delete(&format!("/admin/v1/members/{public_key}")).await,
            Self::Registry(operator) => {
                operator.ask(NODE_REVOKE, &NodeRevoke { token: operator.token.clone(), public_key }).await
            }
            Self::Store(..) => bail!("no registry runs"),
        }
    }

    pub async fn rename_node(&self, public_key: PublicKey, name: &str) -> anyhow::Result<NodeRenamed> {
        match self {
            Self::Gateway(client) => {
                client.patch(&format!("/admin/v1/members/{public_key}"), &json!({ "name": name })).await
            }
            Self::Registry(operator) => {
                let request = NodeRename { token: operator.token.clone(), public_key, name: name.to_owned() };
                operator.ask(NODE_RENAME, &request).await
            }
            Self::Store(..) => bail!("no registry runs"),
        }
    }

    /// Leaves the network, or closes the store.
    pub async fn leave(self) -> anyhow::Result<()> {
        match self {
            Self::Gateway(_) => {}
            Self::Registry(operator) => operator.leave().await,
            Self::Store(_, store) => store.close().await.context("could not close the registry's store")?,
        }
        Ok(())
    }
}

/// Returns whether a gateway answers. A gateway that cannot be talked to is an error, so that it is not silently
/// bypassed.
pub async fn responds(client: &GatewayClient) -> anyhow::Result<bool> {
    match client.presence().await {
        Presence::Answers => Ok(true),
        Presence::Absent(_) | Presence::Foreign(_) => Ok(false),
        Presence::Closed(error) => Err(error),
    }
}

/// Parses a model in a gateway's list. Returns `None` for the rows of adapters and aliases.
fn entry_of(row: &Value) -> Option<ModelEntry> {
    let id = row["id"].as_str()?;
    if id.contains(':') || row["alias_of"].is_string() {
        return None;
    }
    let model_id = id.split('@').next()?.parse().ok()?;
    Some(ModelEntry {
        key: ModelKey { model_id, version: row["version"].as_str()?.parse().ok()? },
        digest: row["digest"].as_str()?.parse().ok()?,
        bytes: row["bytes"].as_u64().unwrap_or(0),
        context_length: row["context_length"].as_u64()?.try_into().ok()?,
        description: row["description"].as_str().unwrap_or_default().to_owned(),
        created_at: UnixMillis(row["created"].as_u64().unwrap_or(0).saturating_mul(1_000)),
        facts: serde_json::from_value(row["facts"].clone()).ok(),
        added: false,
        pin: row["pinned"] == true,
        keep_alive_secs: row["keep_alive_secs"].as_i64(),
    })
}

/// Finds a node by its name, its key or the first digits of its key.
pub fn find_node(members: &[Member], text: &str) -> anyhow::Result<PublicKey> {
    if let Ok(key) = text.parse() {
        return Ok(key);
    }
    let named: Vec<&Member> =
        members.iter().filter(|member| member.node.name == text && member.node.revoked_at.is_none()).collect();
    let is_prefix = text.len() >= PREFIX_MIN && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let begins = |member: &&Member| is_prefix && member.node.public_key.to_string().starts_with(&text.to_lowercase());
    let found = if named.is_empty() { members.iter().filter(begins).collect() } else { named };
    match found[..] {
        [one] => Ok(one.node.public_key),
        [] => bail!("no node has the name {text:?} or a key that begins so; `tether nodes` lists them"),
        ref several => {
            let names: Vec<String> = several
                .iter()
                .map(|member| format!("{} {}", member.node.public_key.short(), member.node.name))
                .collect();
            bail!("{text:?} may be any of {}; give more of the key", names.join(", "))
        }
    }
}

impl Operator {
    /// Finds the registry of the network that this data folder belongs to.
    pub async fn find(server: &ServerArgs, settings: &Settings, data: &DataFolder, env: &Env) -> anyhow::Result<Self> {
        let pool = data.pool()?.with_context(|| {
            format!("{} belongs to no network of processes; start one with `tether registry`", data.path().display())
        })?;
        let token = server.api_key(data, env)?.filter(|token| !token.is_empty()).with_context(|| {
            format!(
                "an API key is needed: {} is missing, TETHER_API_KEY is empty, and --api-key-file was not given; the first \
                 key lies in the registry's data folder",
                data.api_key_file().display()
            )
        })?;
        // A random key: this node only asks and leaves, and need not be found.
        let network = client_network(settings, data, &pool.bootstrap, &random_key()?).await?;
        Ok(Self { token, registry: pool.registry, client: Client::new(network.clone()), network })
    }

    fn asking<T>(&self, request: T) -> ByOperator<T> {
        ByOperator { token: self.token.clone(), request }
    }

    fn request(&self) -> OperatorRequest {
        OperatorRequest { token: self.token.clone() }
    }

    pub async fn ask<Request: Serialize, Reply: DeserializeOwned>(
        &self,
        method: &str,
        request: &Request,
    ) -> anyhow::Result<Reply> {
        let reply = self.client.call(self.registry, method, request, RESPONSE_TIMEOUT).await;
        reply.map_err(|error| match error {
            CallError::Remote(refusal) => anyhow!("the registry refused: {}", refusal.message),
            error => anyhow!("the registry {} cannot be asked: {error}", self.registry.short()),
        })
    }

    pub async fn leave(self) {
        self.network.stop().await;
    }
}

/// Returns a random key for a node that need not be recognised again.
pub fn random_key() -> anyhow::Result<NodeKey> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).context("could not draw random bytes")?;
    Ok(NodeKey::from_seed(&seed))
}

/// Joins a network for a few requests.
pub async fn client_network(
    settings: &Settings,
    data: &DataFolder,
    bootstrap: &[String],
    key: &NodeKey,
) -> anyhow::Result<Arc<HyperswarmTransport>> {
    let roles = ["registry", "gateway", "orchestrator", "worker"];
    let mut bootstrap = settings.network.and(bootstrap).bootstrap_addresses().await?;
    // A node of this folder can be the bootstrap node even when all others are gone.
    bootstrap.extend(roles.iter().filter_map(|role| data.listen_address(role)));
    let options = Options {
        listen: crate::settings::any_port(settings.network.listen),
        bootstrap,
        known: KnownPeers::merged(roles.iter().map(|role| KnownPeers::read(&data.known_peers(role)))),
        public_address: None,
        is_client: true,
    };
    HyperswarmTransport::start(options, key).await.context("could not open a UDP socket")
}

#[cfg(test)]
mod tests {
    use protocol::control::{NodeEntry, NodeRole};

    use super::*;

    fn member(seed: u8, name: &str, is_revoked: bool) -> Member {
        let node = NodeEntry {
            public_key: PublicKey([seed; 32]),
            name: name.to_owned(),
            roles: vec![NodeRole::Worker],
            regions: vec![],
            models: vec![],
            serial: 1,
            joined_at: UnixMillis(0),
            not_after: UnixMillis(1),
            revoked_at: is_revoked.then_some(UnixMillis(1)),
        };
        Member { node, answers: None }
    }

    #[test]
    fn a_node_is_found_by_its_name_its_key_or_the_beginning_of_it() {
        let members = [
            member(0xab, "garage", false),
            member(0xac, "attic", true),
            member(0xad, "attic", false),
            member(0xae, "twin", false),
            member(0xaf, "twin", false),
        ];
        let find = |text: &str| find_node(&members, text).map(|key| key.0[0]);
        assert_eq!(find("garage").expect("by name"), 0xab);
        assert_eq!(find("ABAB").expect("by its beginning"), 0xab);
        assert_eq!(find(&"ac".repeat(32)).expect("by its key"), 0xac);
        assert_eq!(find("attic").expect("the one that was not revoked"), 0xad);
        assert_eq!(find(&"01".repeat(32)).expect("a key that nobody knows"), 1);
        let ambiguous = find("twin").expect_err("two").to_string();
        assert!(ambiguous.contains("aeaeaeae twin") && ambiguous.contains("afafafaf twin"), "{ambiguous}");
        for text in ["ab", "cellar", "abad", ""] {
            assert!(find(text).expect_err(text).to_string().contains("tether nodes"), "{text}");
        }
    }
}
