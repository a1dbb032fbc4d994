//! Checks of `tether doctor` for a network of processes: which nodes respond, whether this machine belongs to it, and
//! whose clock is off.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use protocol::control::{
    CLOCK_READ, ClockReading, Empty, NODE_DESCRIBE, NodeInfo, NodeRole, POOL_STATE, PoolState, PoolStateRequest,
};
use protocol::presence::SKEW_MAX;
use protocol::{Clock as _, ErrorCode, Region, Topic, UnixMillis};
use rpc::transport::hyperswarm::HyperswarmTransport;
use rpc::{CallError, Client, Enrolment, SystemClock, Transport as _};

use super::{Check, Context, check};
use crate::kept_flags::KeptFlags;
use crate::node::Pool;
use crate::operator::{client_network, random_key};
use crate::output;

/// Timeout for a node's description.
const DESCRIBE: Duration = Duration::from_secs(3);
/// The most nodes of one region that are asked. Anyone may announce on a topic.
const NODES_MAX: usize = 64;
/// How long a node may take to respond.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);
/// The roles whose nodes are enrolled.
const ROLES: [&str; 3] = ["orchestrator", "gateway", "worker"];

/// Checks the network that the data folder belongs to. Returns nothing if it belongs to none.
pub(super) async fn checks(context: &Context) -> Vec<Check> {
    let pool = match context.data.pool() {
        Ok(Some(pool)) => pool,
        Ok(None) => return vec![],
        Err(error) => return vec![check("network", Err(format!("{error:#}")))],
    };
    match look(context, &pool).await {
        Ok(checks) => checks,
        Err(error) => vec![check("network", Err(format!("{error:#}")))],
    }
}

async fn look(context: &Context, pool: &Pool) -> anyhow::Result<Vec<Check>> {
    let network = client_network(&context.settings, &context.data, &pool.bootstrap, &random_key()?).await?;
    let addresses = context.settings.network.and(&pool.bootstrap);
    let mut checks = vec![check("bootstrap", bootstrap(&network, &addresses.bootstrap_addresses().await?).await)];
    let stranger = Client::new(network.clone());
    let began = Instant::now();
    let reading = stranger.call::<_, ClockReading>(pool.registry, CLOCK_READ, &Empty {}, RESPONSE_TIMEOUT).await;
    match reading {
        Ok(reading) => {
            let detail =
                format!("{} answers after {:.0} ms", pool.registry.short(), began.elapsed().as_secs_f64() * 1e3);
            checks.push(check("registry", Ok(detail)));
            checks.push(check("clock", clock(SystemClock.now(), reading.now, began.elapsed())));
        }
        Err(error) => {
            let detail = format!("the registry {} does not answer: {error}; see that it runs", pool.registry.short());
            checks.push(check("registry", Err(detail)));
        }
    }
    if let Some(configured) = context.settings.network.public_address {
        checks.push(check("address", public_address(configured, network.seen_address())));
    }
    let regions = regions(context, pool, &stranger).await?;
    let services = services(&network, &stranger, &regions).await;
    drop(stranger);
    network.stop().await;
    checks.push(check("orchestrators", services.of(NodeRole::Orchestrator)));
    checks.push(check("gateways", services.of(NodeRole::Gateway)));
    for role in ROLES {
        if let Some(found) = membership(context, pool, role).await {
            checks.push(check(role, found));
        }
    }
    Ok(checks)
}

/// Compares the configured address with the one that other nodes see. Those of the same local network see another one.
fn public_address(configured: Ipv4Addr, seen: Option<Ipv4Addr>) -> Result<String, String> {
    let is_local = |seen: &Ipv4Addr| seen.is_private() || seen.is_loopback() || seen.is_link_local();
    match seen.filter(|seen| *seen != configured && !is_local(seen)) {
        Some(seen) => Err(format!(
            "network.public_address is {configured}, but other nodes see this machine at {seen}; correct or remove the setting"
        )),
        None => Ok(format!("{configured}, as network.public_address says")),
    }
}

/// Returns the relevant regions: those of this machine's services, and the registry's.
async fn regions(context: &Context, pool: &Pool, client: &Client) -> anyhow::Result<BTreeSet<Region>> {
    let mut regions = BTreeSet::new();
    for role in context.data.roles() {
        let kept: toml::Table = toml::from_str(&KeptFlags::read(&context.data, role)?.to_toml())?;
        let region = kept.get("region").and_then(|region| region.as_str()?.parse().ok());
        regions.insert(region.unwrap_or_else(|| context.settings.region.clone()));
    }
    if let Ok(info) = client.call::<_, NodeInfo>(pool.registry, NODE_DESCRIBE, &Empty {}, RESPONSE_TIMEOUT).await {
        regions.insert(info.region);
    }
    if regions.is_empty() {
        regions.insert(context.settings.region.clone());
    }
    Ok(regions)
}

/// Asks every node that announces itself as a service of these regions for its role.
async fn services(network: &HyperswarmTransport, client: &Client, regions: &BTreeSet<Region>) -> Services {
    let mut services = Services { regions: regions.clone(), ..Services::default() };
    for region in regions {
        let found = network.lookup(&Topic::Control(region.clone())).await.unwrap_or_default();
        let nodes = found.iter().take(NODES_MAX);
        let responses = nodes.map(|key| client.call::<_, NodeInfo>(*key, NODE_DESCRIBE, &Empty {}, DESCRIBE));
        for response in join_all(responses).await {
            match response {
                Ok(info) => {
                    for role in info.roles {
                        *services.reachable.entry((role, info.region.clone())).or_default() += 1;
                    }
                }
                Err(_) => services.silent += 1,
            }
        }
    }
    services
}

/// The services that announce themselves.
#[derive(Debug, Default)]
struct Services {
    regions: BTreeSet<Region>,
    /// How many answer, by role and region.
    reachable: BTreeMap<(NodeRole, Region), usize>,
    /// How many do not answer, of any role.
    silent: usize,
}

impl Services {
    /// Returns how many services of a role answer, and where.
    fn of(&self, role: NodeRole) -> Result<String, String> {
        let word = match role {
            NodeRole::Orchestrator => "orchestrator",
            NodeRole::Gateway => "gateway",
            NodeRole::Registry => "registry",
            NodeRole::Worker => "worker",
        };
        let of_role = self.reachable.iter().filter(|((other, _), _)| *other == role);
        let counts: Vec<String> = of_role.map(|((_, region), count)| format!("{count} in region {region}")).collect();
        if !counts.is_empty() {
            return Ok(format!("answering: {}", counts.join(", ")));
        }
        let regions: Vec<&str> = self.regions.iter().map(Region::as_str).collect();
        let regions = regions.join(" or ");
        Err(if self.silent > 0 {
            format!(
                "no {word} answers in region {regions}; {} announced themselves there and do not answer: start them \
                 again (`tether start`), or see that UDP reaches them",
                output::counted(self.silent, "node")
            )
        } else {
            format!(
                "no {word} answers in region {regions}; start it with `tether {word}`, or bring one in with `tether invite \
                 --role {word}`"
            )
        })
    }
}

async fn bootstrap(network: &HyperswarmTransport, addresses: &[std::net::SocketAddrV4]) -> Result<String, String> {
    let responding = join_all(addresses.iter().map(|address| network.responds(*address))).await;
    let (count, all) = (responding.iter().filter(|responding| **responding).count(), addresses.len());
    if count > 0 {
        return Ok(format!("{count} of {} answer{}", output::counted(all, "node"), if count == 1 { "s" } else { "" }));
    }
    let names: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    Err(format!("no bootstrap node answers at {}; start one, or name another with --bootstrap", names.join(", ")))
}

/// Compares two clocks. The other one was read within the last `within`.
fn clock(ours: UnixMillis, other: UnixMillis, within: Duration) -> Result<String, String> {
    let skew = ours.distance(other).saturating_sub(within);
    if skew <= SKEW_MAX / 2 {
        return Ok("agrees with the registry's".to_owned());
    }
    let word = if ours > other { "ahead of" } else { "behind" };
    let seconds = skew.as_secs_f64();
    Err(format!("this clock is {seconds:.0} s {word} the registry's; set it: reports more than 5 s off are dropped"))
}

/// Checks whether a node of this machine belongs to the network. `None` if there is no such node.
async fn membership(context: &Context, pool: &Pool, role: &'static str) -> Option<Result<String, String>> {
    let path = context.data.enrolment(role);
    let enrolment = match Enrolment::load(&path) {
        Ok(enrolment) => enrolment?,
        Err(error) => return Some(Err(error.to_string())),
    };
    Some(ask(context, pool, role, enrolment).await.map_err(|error| format!("{error:#}")))
}

async fn ask(context: &Context, pool: &Pool, role: &str, enrolment: Enrolment) -> anyhow::Result<String> {
    let key = context.data.node_key(role)?;
    let path = context.data.enrolment(role);
    let membership = enrolment.membership(&path, key.public_key(), std::sync::Arc::new(SystemClock))?;
    let network = client_network(&context.settings, &context.data, &pool.bootstrap, &key).await?;
    let client = Client::new(network.clone()).with_membership(membership);
    let request = PoolStateRequest { version: 0 };
    let state = client.call::<_, PoolState>(pool.registry, POOL_STATE, &request, RESPONSE_TIMEOUT).await;
    drop(client);
    network.stop().await;
    match state {
        Ok(_) if context.data.lock(&[role]).is_ok() => {
            Err(anyhow::anyhow!("this {role} belongs to the network and does not run; start it with `tether start`"))
        }
        Ok(_) => match context.data.unheard().filter(|_| role == "worker") {
            Some(unheard) => Err(anyhow::anyhow!(unheard)),
            None => Ok(format!("{} belongs to the network", key.public_key().short())),
        },
        Err(CallError::Remote(refusal)) if refusal.code == ErrorCode::NodeRevoked => {
            anyhow::bail!(
                "not admitted: this {role} was revoked; to come back it needs a new key: stop it, move nodes/{role}.key and \
                 nodes/{role}.enrolment of the data folder away, and join with a new invite"
            )
        }
        Err(CallError::Remote(refusal)) => anyhow::bail!("not admitted: {}", refusal.message),
        Err(error) => anyhow::bail!("cannot check whether this {role} belongs to the network: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_that_is_missing_is_named_with_what_to_do() {
        let region: Region = "garage".parse().expect("region");
        let mut services = Services { regions: BTreeSet::from([region.clone()]), ..Services::default() };
        let never = services.of(NodeRole::Orchestrator).expect_err("none");
        assert!(never.contains("garage") && never.contains("--role orchestrator"), "{never}");
        services.silent = 1;
        let gone = services.of(NodeRole::Orchestrator).expect_err("none");
        assert!(gone.contains("do not answer") && gone.contains("tether start"), "{gone}");
        services.reachable.insert((NodeRole::Orchestrator, region), 2);
        let reachable = services.of(NodeRole::Orchestrator).expect("two");
        assert_eq!(reachable, "answering: 2 in region garage");
        assert!(services.of(NodeRole::Gateway).is_err());
    }

    #[test]
    fn a_public_address_that_others_do_not_see_is_doubted() {
        let configured = Ipv4Addr::new(203, 0, 113, 7);
        assert!(public_address(configured, None).is_ok());
        assert!(public_address(configured, Some(configured)).is_ok());
        assert!(
            public_address(configured, Some(Ipv4Addr::new(192, 168, 1, 5))).is_ok(),
            "nodes of the same local network"
        );
        let error = public_address(configured, Some(Ipv4Addr::new(198, 51, 100, 9))).expect_err("another one");
        assert!(error.contains("203.0.113.7") && error.contains("198.51.100.9"), "{error}");
    }

    #[test]
    fn a_clock_is_off_by_more_than_the_answer_took() {
        let at = |seconds: u64| UnixMillis(1_700_000_000_000 + seconds * 1000);
        assert!(clock(at(0), at(2), Duration::ZERO).is_ok());
        assert!(clock(at(9), at(0), Duration::from_secs(8)).is_ok());
        let error = clock(at(60), at(0), Duration::ZERO).expect_err("a minute");
        assert!(error.starts_with("this clock is 60 s ahead of the registry's"), "{error}");
        assert!(clock(at(0), at(60), Duration::ZERO).expect_err("a minute").contains("60 s behind"));
    }
}
