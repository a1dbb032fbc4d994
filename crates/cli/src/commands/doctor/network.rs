//! What `tether doctor` says of a network of processes: who answers, whether this machine belongs to it, whose clock is off.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use protocol::control::{CLOCK_READ, ClockReading, Empty, POOL_STATE, PoolState, PoolStateRequest};
use protocol::presence::SKEW_MAX;
use protocol::{Clock as _, ErrorCode, UnixMillis};
use rpc::transport::hyperswarm::HyperswarmTransport;
use rpc::{CallError, Client, Enrolment, SystemClock};

use super::{Check, Context, check};
use crate::node::Pool;
use crate::operator::{client_network, random_key};

/// How long a node may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// The roles of nodes that have an enrolment.
const ROLES: [&str; 3] = ["orchestrator", "gateway", "worker"];

/// Looks at the network that the data folder belongs to. There is nothing to say where it belongs to none.
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
    let reading = stranger.call::<_, ClockReading>(pool.registry, CLOCK_READ, &Empty {}, PATIENCE).await;
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
    drop(stranger);
    network.stop().await;
    for role in ROLES {
        if let Some(found) = admission(context, pool, role).await {
            checks.push(check(role, found));
        }
    }
    Ok(checks)
}

async fn bootstrap(network: &HyperswarmTransport, addresses: &[std::net::SocketAddrV4]) -> Result<String, String> {
    let answers = join_all(addresses.iter().map(|address| network.answers(*address))).await;
    let (count, all) = (answers.iter().filter(|answers| **answers).count(), addresses.len());
    if count > 0 {
        return Ok(format!("{count} of {all} nodes answer"));
    }
    let names: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    Err(format!("no bootstrap node answers at {}; start one, or name another with --bootstrap", names.join(", ")))
}

/// Compares two clocks, of which the other was read at some time within the last `within`.
fn clock(ours: UnixMillis, other: UnixMillis, within: Duration) -> Result<String, String> {
    let skew = ours.distance(other).saturating_sub(within);
    if skew <= SKEW_MAX / 2 {
        return Ok("agrees with the registry's".to_owned());
    }
    let word = if ours > other { "ahead of" } else { "behind" };
    let seconds = skew.as_secs_f64();
    Err(format!("this clock is {seconds:.0} s {word} the registry's; set it: reports more than 5 s off are dropped"))
}

/// Says whether a node of this machine belongs to the network. `None` where there is no such node.
async fn admission(context: &Context, pool: &Pool, role: &'static str) -> Option<Result<String, String>> {
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
    let state = client.call::<_, PoolState>(pool.registry, POOL_STATE, &request, PATIENCE).await;
    drop(client);
    network.stop().await;
    match state {
        Ok(_) => Ok(format!("{} belongs to the network", key.public_key().short())),
        Err(CallError::Remote(refusal)) if refusal.code == ErrorCode::NodeRevoked => {
            anyhow::bail!("not admitted: this {role} was revoked; it needs a new key and a new invite")
        }
        Err(CallError::Remote(refusal)) => anyhow::bail!("not admitted: {}", refusal.message),
        Err(error) => anyhow::bail!("nobody can say whether this {role} belongs to the network: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
