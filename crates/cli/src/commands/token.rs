//! `tether token`: makes, lists and revokes API keys. A running network is asked; where none runs, the registry's own
//! store is opened.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use metadata_store::MetadataStore;
use protocol::control::{Scope, TokenCreate, TokenCreated, TokenInfo, TokenList, TokenRevoked};
use protocol::{Clock as _, UnixMillis};
use registry::TokenOffice;
use rpc::SystemClock;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{Context, Outcome};
use crate::args::{ServerArgs, TokenCreateArgs};
use crate::client::GatewayClient;
use crate::output;
use crate::services::open_store;

pub(super) async fn create(context: Context, args: TokenCreateArgs) -> anyhow::Result<Outcome> {
    let days = |days: u32| SystemClock.now().after(Duration::from_hours(24) * days);
    let new = TokenCreate {
        tenant_id: args.tenant.parse()?,
        name: args.name,
        scopes: if args.admin { vec![Scope::Infer, Scope::Admin] } else { vec![Scope::Infer] },
        expires_at: args.expires_days.map(days),
        requests_per_minute: args.requests_per_minute,
    };
    let created: TokenCreated = match Desk::find(&context).await? {
        Desk::Running(client) => client.post("/admin/v1/tokens", &new).await?,
        Desk::Stopped(office, store) => closing(&*store, office.issue(new).await.map_err(Into::into)).await?,
    };
    if context.json {
        output::json(&created)?;
    } else {
        output::line(created.token);
    }
    Ok(Outcome::Well)
}

pub(super) async fn list(context: Context) -> anyhow::Result<Outcome> {
    let TokenList { tokens } = match Desk::find(&context).await? {
        Desk::Running(client) => client.get("/admin/v1/tokens").await?,
        Desk::Stopped(office, store) => closing(&*store, office.list().await.map_err(Into::into)).await?,
    };
    if context.json {
        output::json(&tokens)?;
        return Ok(Outcome::Well);
    }
    let now = SystemClock.now();
    let rows: Vec<Vec<String>> = tokens.into_iter().map(|token| row(token, now)).collect();
    output::table(&["KEY", "TENANT", "SCOPES", "STATE", "MADE", "NAME"], &rows);
    Ok(Outcome::Well)
}

pub(super) async fn revoke(context: Context, key_id: &str) -> anyhow::Result<Outcome> {
    // The key id becomes part of a path.
    let well_formed = key_id.len() == 8 && key_id.bytes().all(|byte| byte.is_ascii_alphanumeric());
    let found = well_formed
        && match Desk::find(&context).await? {
            Desk::Running(client) => client.delete::<TokenRevoked>(&format!("/admin/v1/tokens/{key_id}")).await?.found,
            Desk::Stopped(office, store) => {
                closing(&*store, office.revoke(key_id).await.map_err(Into::into)).await?.found
            }
        };
    if found {
        output::line(format!("{key_id} is revoked; it stops working within 5 seconds"));
        Ok(Outcome::Well)
    } else {
        output::line(format!("there is no key {key_id}; `tether token list` shows them"));
        Ok(Outcome::Finding)
    }
}

/// Where tokens are kept.
enum Desk {
    Running(GatewayClient),
    Stopped(TokenOffice, Arc<dyn MetadataStore>),
}

impl Desk {
    async fn find(context: &Context) -> anyhow::Result<Self> {
        let args = ServerArgs { url: context.env.get("TETHER_URL").map(str::to_owned), api_key_file: None };
        let client = GatewayClient::find(&args, &context.settings, &context.data, &context.env)?;
        if args.url.is_some() || client.answers().await {
            return Ok(Self::Running(client));
        }
        context.data.create()?;
        let store = open_store(&context.data.registry_store()).context("could not open the registry's store")?;
        let office = TokenOffice::new(store.clone(), Arc::new(SystemClock), context.data.pepper()?);
        Ok(Self::Stopped(office, store))
    }
}

async fn closing<T>(store: &dyn MetadataStore, outcome: anyhow::Result<T>) -> anyhow::Result<T> {
    store.close().await.context("could not close the registry's store")?;
    outcome
}

fn row(token: TokenInfo, now: UnixMillis) -> Vec<String> {
    let word = |scope: &Scope| match scope {
        Scope::Infer => "infer",
        Scope::Admin => "admin",
    };
    let state = match (token.revoked_at, token.expires_at) {
        (Some(_), _) => "revoked",
        (None, Some(end)) if end <= now => "expired",
        _ => "good",
    };
    vec![
        token.key_id,
        token.tenant_id.to_string(),
        token.scopes.iter().map(word).collect::<Vec<_>>().join(","),
        state.to_owned(),
        date(token.created_at),
        token.name,
    ]
}

fn date(at: UnixMillis) -> String {
    let seconds = (at.0 / 1000) as i64;
    OffsetDateTime::from_unix_timestamp(seconds).ok().and_then(|time| time.format(&Rfc3339).ok()).unwrap_or_default()
}
