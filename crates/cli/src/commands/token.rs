//! `tether token`: creates, lists and revokes API keys.

use std::io::{self, BufRead as _, IsTerminal as _};
use std::time::Duration;

use anyhow::bail;
use protocol::control::{Scope, TokenCreate, TokenInfo};
use protocol::{Clock as _, UnixMillis};
use rpc::SystemClock;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{Context, Outcome};
use crate::args::{ServerArgs, TokenCreateArgs, TokenRevokeArgs};
use crate::operator::AdminClient;
use crate::output;

pub(super) async fn create(context: Context, args: TokenCreateArgs) -> anyhow::Result<Outcome> {
    let days = |days: u32| SystemClock.now().after(Duration::from_hours(24) * days);
    let new = TokenCreate {
        tenant_id: args.tenant.parse()?,
        name: args.name,
        scopes: if args.admin { vec![Scope::Infer, Scope::Admin] } else { vec![Scope::Infer] },
        expires_at: args.expires_days.map(days),
        requests_per_minute: args.requests_per_minute,
    };
    let admin = admin(&context, &args.server).await?;
    let created = admin.create_token(new).await;
    admin.leave().await?;
    let created = created?;
    if context.json {
        output::json(&created)?;
    } else {
        output::line(created.token);
    }
    Ok(Outcome::Well)
}

pub(super) async fn list(context: Context, server: &ServerArgs) -> anyhow::Result<Outcome> {
    let admin = admin(&context, server).await?;
    let tokens = admin.tokens().await;
    admin.leave().await?;
    let tokens = tokens?;
    if context.json {
        output::json(&tokens)?;
        return Ok(Outcome::Well);
    }
    let now = SystemClock.now();
    let rows: Vec<Vec<String>> = tokens.into_iter().map(|token| row(token, now)).collect();
    output::table(&["KEY", "TENANT", "SCOPES", "STATE", "MADE", "NAME"], &rows);
    Ok(Outcome::Well)
}

pub(super) async fn revoke(context: Context, args: &TokenRevokeArgs) -> anyhow::Result<Outcome> {
    let key_id = args.key_id.as_str();
    // The key id becomes part of a path.
    let well_formed = key_id.len() == 8 && key_id.bytes().all(|byte| byte.is_ascii_alphanumeric());
    let mut found = false;
    if well_formed {
        let admin = admin(&context, &args.server).await?;
        let revoked = revoke_at(&admin, args).await;
        admin.leave().await?;
        found = revoked?;
    }
    if found {
        output::line(format!("{key_id} is revoked; it stops working within 5 seconds"));
        Ok(Outcome::Well)
    } else {
        output::line(format!("there is no key {key_id}; `tether token list` shows them"));
        Ok(Outcome::Finding)
    }
}

async fn revoke_at(admin: &AdminClient, args: &TokenRevokeArgs) -> anyhow::Result<bool> {
    if !args.yes && is_last_admin(&admin.tokens().await?, &args.key_id, SystemClock.now()) {
        confirm(&format!(
            "{} is the last key that operates this network. Without it keys, invites and revocations are made only with the \
             registry stopped, by `tether token create --admin` in its data folder.",
            args.key_id
        ))?;
    }
    Ok(admin.revoke_token(&args.key_id).await?.found)
}

/// Asks the user for confirmation. A script must confirm with a flag.
pub(super) fn confirm(warning: &str) -> anyhow::Result<()> {
    if !io::stdin().is_terminal() {
        bail!("{warning} Give --yes to go on");
    }
    output::piece(&format!("{warning}\nType yes to go on: "));
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    if answer.trim() != "yes" {
        bail!("nothing was changed");
    }
    Ok(())
}

/// Returns whether a key is the only valid one with the admin scope.
fn is_last_admin(tokens: &[TokenInfo], key_id: &str, now: UnixMillis) -> bool {
    let is_good = |token: &&TokenInfo| {
        token.scopes.contains(&Scope::Admin)
            && token.revoked_at.is_none()
            && token.expires_at.is_none_or(|end| end > now)
    };
    let mut good = tokens.iter().filter(is_good);
    good.next().is_some_and(|first| first.key_id == key_id) && good.next().is_none()
}

async fn admin(context: &Context, server: &ServerArgs) -> anyhow::Result<AdminClient> {
    AdminClient::of_registry(server, &context.settings, &context.data, &context.env).await
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

pub(super) fn date(at: UnixMillis) -> String {
    let seconds = (at.0 / 1000) as i64;
    OffsetDateTime::from_unix_timestamp(seconds).ok().and_then(|time| time.format(&Rfc3339).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(key_id: &str, scopes: &[Scope], revoked_at: Option<u64>, expires_at: Option<u64>) -> TokenInfo {
        TokenInfo {
            key_id: key_id.to_owned(),
            tenant_id: "acme".parse().expect("tenant"),
            name: String::new(),
            scopes: scopes.to_vec(),
            created_at: UnixMillis(0),
            expires_at: expires_at.map(UnixMillis),
            revoked_at: revoked_at.map(UnixMillis),
        }
    }

    #[test]
    fn the_last_good_key_that_operates_is_known() {
        let both = [Scope::Infer, Scope::Admin];
        let tokens = [
            token("revoked0", &both, Some(1), None),
            token("expired0", &both, None, Some(5)),
            token("caller00", &[Scope::Infer], None, None),
            token("first000", &both, None, Some(50)),
        ];
        let is_last = |tokens: &[TokenInfo], key_id: &str| is_last_admin(tokens, key_id, UnixMillis(10));
        assert!(is_last(&tokens, "first000"));
        assert!(!is_last(&tokens, "revoked0") && !is_last(&tokens, "caller00") && !is_last(&tokens, "nobody00"));
        let more: Vec<TokenInfo> = tokens.into_iter().chain([token("second00", &both, None, None)]).collect();
        assert!(!is_last(&more, "first000") && !is_last(&more, "second00"));
        assert!(!is_last(&[], "first000"));
    }
}
