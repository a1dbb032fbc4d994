use std::time::Duration;

use super::*;

fn node(number: u16) -> SocketAddrV4 {
    SocketAddrV4::new([10, 0, 0, 1].into(), number)
}

fn reply(from: SocketAddrV4, closer_nodes: &[SocketAddrV4]) -> DhtReply {
    DhtReply {
        from,
        from_id: Some(node_id(from)),
        to: node(9),
        on_server_socket: true,
        rtt: Duration::ZERO,
        token: None,
        closer_nodes: closer_nodes.to_vec(),
        error: 0,
        value: None,
    }
}

fn by_distance(target: &Id, numbers: std::ops::RangeInclusive<u16>) -> Vec<SocketAddrV4> {
    let mut nodes: Vec<_> = numbers.map(node).collect();
    nodes.sort_by_key(|node| distance(target, &node_id(*node)));
    nodes
}

fn ask_all(walk: &mut Walk) -> Vec<SocketAddrV4> {
    std::iter::from_fn(|| walk.next()).collect()
}

#[test]
fn a_walk_ends_at_the_closest_of_all_nodes() {
    let target = [7; 32];
    let all = by_distance(&target, 1..=200);
    let mut walk = Walk::new(target, None, 10, false);
    walk.add(all[199]);
    let mut asked = 0;
    while let Some(next) = walk.next() {
        asked += 1;
        // Every node knows twenty nodes that are a little closer than itself.
        let index = all.iter().position(|node| *node == next).unwrap();
        walk.answered(next, &reply(next, &all[index.saturating_sub(40)..][..20]));
    }
    assert_eq!(walk.progress(), Progress::Done);
    assert!(asked < 120, "{asked} were asked");
    let closest: Vec<_> = walk.into_closest().into_iter().map(|reply| reply.from).collect();
    assert_eq!(closest, all[..20]);
}

#[test]
fn only_so_many_are_asked_at_once_but_late_ones_do_not_count() {
    let mut walk = Walk::new([7; 32], None, 4, false);
    (1..=10).for_each(|number| walk.add(node(number)));
    let asked = ask_all(&mut walk);
    assert_eq!(asked.len(), 4);
    walk.late(asked[0]);
    walk.late(asked[1]);
    assert_eq!(ask_all(&mut walk).len(), 2);
}

#[test]
fn whoever_named_a_dead_node_hears_of_it() {
    let mut walk = Walk::new([7; 32], None, 10, false);
    let (first, second, dead) = (node(1), node(2), node(3));
    walk.add(first);
    walk.add(second);
    ask_all(&mut walk);
    walk.answered(first, &reply(first, &[dead]));
    assert_eq!(ask_all(&mut walk), [dead]);
    walk.failed(dead);
    assert_eq!(walk.take_hints(), [DownHint { to: first, down: dead }]);
    walk.answered(second, &reply(second, &[dead]));
    assert_eq!(walk.take_hints(), [DownHint { to: second, down: dead }]);
    assert_eq!(walk.progress(), Progress::Done);
}

#[test]
fn a_dead_node_is_not_waited_for_once_another_has_answered() {
    let mut walk = Walk::new([7; 32], None, 10, false);
    let (alive, dead) = (node(1), node(2));
    walk.add(alive);
    walk.add(dead);
    ask_all(&mut walk);
    walk.late(dead);
    walk.late(dead);
    assert_eq!(walk.progress(), Progress::Waiting);
    walk.answered(alive, &reply(alive, &[]));
    assert_eq!(walk.progress(), Progress::Done);
}

#[test]
fn a_walk_from_old_nodes_that_are_gone_asks_for_others() {
    let mut walk = Walk::new([7; 32], None, 10, true);
    (1..=20).for_each(|number| walk.add(node(number)));
    let mut asked = ask_all(&mut walk);
    assert_eq!(asked.len(), 3, "the closest get a head start");
    while let Some(node) = asked.pop() {
        walk.failed(node);
        asked.extend(ask_all(&mut walk));
    }
    assert_eq!(walk.progress(), Progress::NeedsNodes);
    walk.widen();
    walk.add(node(99));
    assert_eq!(ask_all(&mut walk), [node(99)]);
}

#[test]
fn a_node_does_not_ask_itself() {
    let mut walk = Walk::new([7; 32], Some(node_id(node(2))), 10, false);
    walk.add(node(1));
    ask_all(&mut walk);
    walk.answered(node(1), &reply(node(1), &[node(2), node(3)]));
    assert_eq!(ask_all(&mut walk), [node(3)]);
}

#[test]
fn endless_names_are_cut_short() {
    let mut walk = Walk::new([7; 32], None, 10, false);
    walk.add(node(1));
    let mut asked = 0_u16;
    while let Some(next) = walk.next() {
        asked += 1;
        // Without an id a node never counts as close.
        let fresh: Vec<_> = (0..20).map(|index| node(100 + asked * 20 + index)).collect();
        walk.answered(next, &DhtReply { from_id: None, ..reply(next, &fresh) });
    }
    assert_eq!(usize::from(asked), NODES_MAX);
}
