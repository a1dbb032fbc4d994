//! `tether invite`, `join`, `revoke` and `rename`: who belongs to the network.

use std::net::SocketAddrV4;

use anyhow::{Context as _, bail};
use protocol::PublicKey;
use protocol::control::{InviteCreate, NodeRole};
use protocol::membership::Invite;
use rpc::{Client, Enrolment, JoinError, SystemClock};

use super::serve::{follow_parent, name, run_role};
use super::{Context, Outcome};
use crate::args::{InviteArgs, JoinArgs, RenameArgs, RevokeArgs, Role};
use crate::node::{Node, Pool};
use crate::operator::{AdminClient, find_node};
use crate::output;

impl From<Role> for NodeRole {
    fn from(role: Role) -> Self {
        match role {
            Role::Gateway => Self::Gateway,
            Role::Orchestrator => Self::Orchestrator,
            Role::Worker => Self::Worker,
        }
    }
}

/// Creates an invite and prints the command that redeems it.
pub(super) async fn invite(context: Context, args: InviteArgs) -> anyhow::Result<Outcome> {
    let regions = args.regions.iter().map(|region| region.parse()).collect::<Result<_, _>>()?;
    if args.server.url.is_none() && context.data.pool()?.is_none() && context.data.address().is_some() {
        bail!(
            "the network of {} runs in one process, and no machine can join it; start it with `tether up --listen \
             0.0.0.0:49737`",
            context.data.path().display()
        );
    }
    let admin = AdminClient::of_nodes(&args.server, &context.settings, &context.data, &context.env).await?;
    let new = InviteCreate {
        token: String::new(),
        roles: vec![args.role.into()],
        regions,
        models: vec![],
        name: args.name,
        valid_secs: Some(u64::from(args.hours) * 3600),
        bootstrap: vec![],
    };
    let created = admin.invite(new).await;
    admin.leave().await?;
    let created = created?;
    if context.json {
        output::json(&created)?;
    } else {
        output::line(format!("tether join {}", created.invite));
    }
    Ok(Outcome::Well)
}

/// Returns the role that an invite is for.
pub(super) fn role_of(invite: &str) -> anyhow::Result<NodeRole> {
    let invite: Invite = invite.trim().parse().context("this is not an invite")?;
    let [role] = invite.roles[..] else { bail!("the invite is for {} roles, and a node has one", invite.roles.len()) };
    Ok(role)
}

/// Redeems an invite, and runs a node of its role.
pub(super) async fn join(context: Context, args: JoinArgs) -> anyhow::Result<Outcome> {
    follow_parent(&args.node)?;
    let invite: Invite = args.invite.trim().parse().context("this is not an invite")?;
    let role = role_of(&args.invite)?;
    let name = name(role)?;
    context.data.create()?;
    let _lock = context.data.lock(&[name])?;
    let path = context.data.enrolment(name);
    if let Some(enrolment) = Enrolment::load(&path)?
        && enrolment.pool != invite.pool
    {
        bail!("this {name} belongs to another network; name another folder with --data-dir");
    }
    let node = Node::start(&context.settings, &context.data, name, &invite.bootstrap).await?;
    let client = Client::new(node.transport());
    let enrolment = match Enrolment::redeem(&client, &invite, &host_name(), &SystemClock).await {
        Ok(enrolment) => enrolment,
        Err(error) => {
            let why = match error {
                JoinError::Unreachable(_) => no_way(&node.reachable(&invite.bootstrap).await?),
                _ => "could not join".to_owned(),
            };
            node.stop().await;
            return Err(error).context(why);
        }
    };
    drop(client);
    enrolment.save(&path)?;
    context.data.write_pool(&Pool { registry: enrolment.registry, bootstrap: enrolment.bootstrap.clone() })?;
    context.keep_flags()?;
    output::line(format!("joined the network {} as {name}", enrolment.pool.short()));
    if args.only_enrol {
        node.stop().await;
        output::line(format!("start it with: tether {name}"));
        return Ok(Outcome::Well);
    }
    Box::pin(run_role(&context, role, &node)).await
}

/// Removes a node from the network.
pub(super) async fn revoke(context: Context, args: RevokeArgs) -> anyhow::Result<Outcome> {
    let admin = AdminClient::of_nodes(&args.server, &context.settings, &context.data, &context.env).await?;
    let outcome = async {
        let public_key = find(&admin, &args.node).await?;
        anyhow::Ok((public_key, admin.revoke_node(public_key).await?))
    };
    let outcome = outcome.await;
    admin.leave().await?;
    let (public_key, revoked) = outcome?;
    if context.json {
        output::json(&revoked)?;
    } else if revoked.found {
        output::line(format!("{} is out; no node deals with it within 5 seconds", public_key.short()));
    } else {
        output::line(format!("{} was never admitted; it is now refused for good", public_key.short()));
    }
    Ok(if revoked.found { Outcome::Well } else { Outcome::Finding })
}

pub(super) async fn rename(context: Context, args: RenameArgs) -> anyhow::Result<Outcome> {
    let admin = AdminClient::of_nodes(&args.server, &context.settings, &context.data, &context.env).await?;
    let outcome = async {
        let public_key = find(&admin, &args.node).await?;
        anyhow::Ok((public_key, admin.rename_node(public_key, &args.name).await?))
    };
    let outcome = outcome.await;
    admin.leave().await?;
    let (public_key, renamed) = outcome?;
    if context.json {
        output::json(&renamed)?;
    } else if renamed.found {
        output::line(format!("{} is called {}", public_key.short(), args.name));
    } else {
        output::line(format!("{} was never admitted", public_key.short()));
    }
    Ok(if renamed.found { Outcome::Well } else { Outcome::Finding })
}

/// Reports which addresses respond, when the registry cannot be reached.
fn no_way(addresses: &[(SocketAddrV4, bool)]) -> String {
    if let Some((address, _)) = addresses.iter().find(|(_, answers)| *answers) {
        return format!("could not join: {address} answers, but the registry does not; see that it runs");
    }
    let tried: Vec<String> = addresses.iter().map(|(address, _)| address.to_string()).collect();
    let Some((first, _)) = addresses.first() else {
        return "could not join: the invite names no address; name one with --bootstrap HOST:PORT".to_owned();
    };
    let port = first.port();
    let private = if addresses.iter().all(|(address, _)| address.ip().is_private() || address.ip().is_loopback()) {
        format!(
            " (a private address is reached from its own network only; from outside, forward UDP port {port} of its router to \
             it and give --bootstrap ROUTER:{port})"
        )
    } else {
        String::new()
    };
    format!(
        "could not join: nothing answers by UDP at {}{private}; see that the registry runs and that no firewall closes the \
         port",
        tried.join(", ")
    )
}

/// Returns a node's public key. A complete key needs no lookup.
async fn find(admin: &AdminClient, text: &str) -> anyhow::Result<PublicKey> {
    match text.parse() {
        Ok(public_key) => Ok(public_key),
        Err(_) => find_node(&admin.members().await?, text),
    }
}

/// Returns this machine's host name, for the network's lists.
fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_cannot_join_is_told_which_way_is_closed() {
        let address = |text: &str| text.parse::<SocketAddrV4>().expect("an address");
        let walled = no_way(&[(address("192.168.50.2:49737"), false)]);
        assert!(walled.contains("nothing answers by UDP at 192.168.50.2:49737"), "{walled}");
        assert!(walled.contains("--bootstrap ROUTER:49737"), "{walled}");
        let public = no_way(&[(address("192.168.50.2:49737"), false), (address("8.8.8.8:49737"), false)]);
        assert!(!public.contains("ROUTER") && public.contains("8.8.8.8:49737"), "{public}");
        let there = no_way(&[(address("192.168.50.2:49737"), false), (address("192.168.50.3:1"), true)]);
        assert!(there.contains("192.168.50.3:1 answers, but the registry does not"), "{there}");
        assert!(no_way(&[]).contains("--bootstrap HOST:PORT"));
    }
}
