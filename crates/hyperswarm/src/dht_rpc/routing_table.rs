//! The Kademlia routing table: the known nodes by distance, in 256 rows (k-buckets) of at most 20.

use std::net::SocketAddrV4;

use super::message::Id;

/// The bucket size: how many nodes a row holds, a response returns and a query looks for.
pub const K: usize = 20;

/// A node of the routing table. Times are in ticks of five seconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TableNode {
    /// The hash of the address.
    pub(super) id: Id,
    /// The node's address.
    pub(super) address: SocketAddrV4,
    /// This node's address as that node reported it.
    pub(super) to: Option<SocketAddrV4>,
    /// When `to` was counted as a sample, if it was.
    pub(super) sampled: Option<u64>,
    /// When the node was added to the table.
    pub(super) added: u64,
    /// When the node was last pinged or heard.
    pub(super) pinged: u64,
    /// When the node was last heard.
    pub(super) seen: u64,
    /// How often others reported the node as down since it was last heard.
    pub(super) down_hints: u32,
    /// The node's position in the order of last contact. The table sets it.
    order: u64,
}

impl TableNode {
    /// Makes a node that was heard just now.
    pub(super) fn new(id: Id, address: SocketAddrV4, to: Option<SocketAddrV4>, tick: u64) -> Self {
        Self { id, address, to, sampled: None, added: tick, pinged: tick, seen: tick, down_hints: 0, order: 0 }
    }
}

/// The result of an insertion.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Insertion {
    /// The node is in the table.
    Added,
    /// The row is full.
    Full,
    /// It is this node itself, or is in the table already.
    Known,
}

/// The known nodes, by the number of leading bits that their ids share with this node's id.
#[derive(Debug)]
pub(super) struct RoutingTable {
    id: Id,
    rows: Vec<Vec<TableNode>>,
    /// The same nodes in the order of last contact, oldest first.
    heard: std::collections::BTreeMap<u64, Id>,
    orders: u64,
}

impl RoutingTable {
    /// Makes an empty table centred on an id.
    pub(super) fn new(id: Id) -> Self {
        Self { id, rows: vec![Vec::new(); 256], heard: std::collections::BTreeMap::new(), orders: 0 }
    }

    /// Returns the id that distances are measured from.
    pub(super) fn id(&self) -> &Id {
        &self.id
    }

    /// Returns the number of nodes.
    pub(super) fn len(&self) -> usize {
        self.heard.len()
    }

    /// Returns whether the table has no nodes.
    pub(super) fn is_empty(&self) -> bool {
        self.heard.is_empty()
    }

    /// Returns a node.
    pub(super) fn get(&self, id: &Id) -> Option<&TableNode> {
        self.rows[self.row_of(id)?].iter().find(|node| node.id == *id)
    }

    /// Returns a mutable reference to a node.
    pub(super) fn get_mut(&mut self, id: &Id) -> Option<&mut TableNode> {
        let row = self.row_of(id)?;
        self.rows[row].iter_mut().find(|node| node.id == *id)
    }

    /// Adds a node as the most recently heard.
    pub(super) fn insert(&mut self, mut node: TableNode) -> Insertion {
        let Some(row) = self.row_of(&node.id) else { return Insertion::Known };
        let row = &mut self.rows[row];
        if row.iter().any(|known| known.id == node.id) {
            return Insertion::Known;
        }
        if row.len() >= K {
            return Insertion::Full;
        }
        self.orders += 1;
        node.order = self.orders;
        self.heard.insert(node.order, node.id);
        row.push(node);
        Insertion::Added
    }

    /// Marks a node as the most recently heard, at this tick.
    pub(super) fn touch(&mut self, id: &Id, tick: u64) {
        let order = self.orders + 1;
        let Some(node) = self.get_mut(id) else { return };
        node.pinged = tick;
        node.seen = tick;
        node.down_hints = 0;
        let old = std::mem::replace(&mut node.order, order);
        self.orders = order;
        self.heard.remove(&old);
        self.heard.insert(order, *id);
    }

    /// Removes a node.
    pub(super) fn remove(&mut self, id: &Id) -> Option<TableNode> {
        let row = self.row_of(id)?;
        let row = &mut self.rows[row];
        let index = row.iter().position(|node| node.id == *id)?;
        let node = row.swap_remove(index);
        self.heard.remove(&node.order);
        Some(node)
    }

    /// Returns the nodes in the row of an id.
    pub(super) fn row(&self, id: &Id) -> &[TableNode] {
        self.row_of(id).map_or(&[], |row| &self.rows[row])
    }

    /// Returns the known nodes closest to a target, closest first.
    pub(super) fn closest(&self, target: &Id, count: usize) -> Vec<&TableNode> {
        let row = self.row_of(target).unwrap_or(255);
        let mut found: Vec<&TableNode> = Vec::with_capacity(count.min(self.len()));
        // The nodes of the target's own row are the closest. Those of the later rows share fewer bits with the target
        // than with this node. Those of the earlier rows are the farthest, each row farther than the next.
        let near = std::iter::once(row..row + 1).chain(std::iter::once(row + 1..256));
        for rows in near.chain((0..row).rev().map(|row| row..row + 1)) {
            if found.len() >= count {
                break;
            }
            let start = found.len();
            found.extend(self.rows[rows].iter().flatten());
            found[start..].sort_unstable_by_key(|node| distance(target, &node.id));
        }
        found.truncate(count);
        found
    }

    /// Returns the nodes, the least recently heard first.
    pub(super) fn oldest(&self) -> impl Iterator<Item = &TableNode> {
        self.heard.values().filter_map(|id| self.get(id))
    }

    /// Returns the nodes, the most recently heard first.
    pub(super) fn latest(&self) -> impl Iterator<Item = &TableNode> {
        self.heard.values().rev().filter_map(|id| self.get(id))
    }

    /// Returns the node at a random index.
    pub(super) fn pick(&self, random: u64) -> Option<&TableNode> {
        let index = (random % self.len().max(1) as u64) as usize;
        self.rows.iter().flatten().nth(index)
    }

    /// Measures distances from another id. Nodes that no longer fit are dropped.
    pub(super) fn move_to(&mut self, id: Id) {
        let old = std::mem::replace(self, Self::new(id));
        let mut nodes: Vec<_> = old.rows.into_iter().flatten().collect();
        nodes.sort_unstable_by_key(|node| node.order);
        for node in nodes {
            self.insert(node);
        }
    }

    fn row_of(&self, id: &Id) -> Option<usize> {
        let byte = self.id.iter().zip(id).position(|(own, other)| own != other)?;
        Some(byte * 8 + (self.id[byte] ^ id[byte]).leading_zeros() as usize)
    }
}

/// Returns the XOR distance of two ids. Smaller is closer.
pub(super) fn distance(left: &Id, right: &Id) -> Id {
    std::array::from_fn(|index| left[index] ^ right[index])
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn node(id: Id) -> TableNode {
        TableNode::new(id, SocketAddrV4::new(u32::from_le_bytes([id[0], id[1], id[2], id[3]]).into(), 1), None, 0)
    }

    #[test]
    fn a_full_row_takes_no_more() {
        let mut table = RoutingTable::new([0; 32]);
        for last in 0..20 {
            let mut id = [0x80; 32];
            id[31] = last;
            assert_eq!(table.insert(node(id)), Insertion::Added);
        }
        assert_eq!(table.insert(node([0xff; 32])), Insertion::Full);
        assert_eq!(table.insert(node([0x40; 32])), Insertion::Added);
        assert_eq!(table.insert(node([0; 32])), Insertion::Known);
    }

    #[test]
    fn a_node_that_is_heard_becomes_the_latest() {
        let mut table = RoutingTable::new([0; 32]);
        for first in [1, 2, 3] {
            table.insert(node([first; 32]));
        }
        table.touch(&[1; 32], 7);
        assert_eq!(table.latest().map(|node| node.id[0]).collect::<Vec<_>>(), [1, 3, 2]);
        assert_eq!(table.get(&[1; 32]).unwrap().seen, 7);
        table.remove(&[3; 32]);
        assert_eq!(table.oldest().map(|node| node.id[0]).collect::<Vec<_>>(), [2, 1]);
    }

    proptest! {
        #[test]
        fn the_closest_are_those_a_full_sort_finds(
            own: Id,
            ids in vec(any::<Id>(), 0..200),
            near in vec(any::<[u8; 30]>(), 0..40),
            target: Id,
            count in 0_usize..30,
        ) {
            let mut table = RoutingTable::new(own);
            for tail in near {
                let mut id = own;
                id[2..].copy_from_slice(&tail);
                table.insert(node(id));
            }
            for id in ids {
                table.insert(node(id));
            }
            for target in [target, own] {
                let mut all: Vec<Id> = table.oldest().map(|node| node.id).collect();
                all.sort_by_key(|id| distance(&target, id));
                all.truncate(count);
                let found: Vec<Id> = table.closest(&target, count).iter().map(|node| node.id).collect();
                prop_assert_eq!(found, all);
            }
        }

        #[test]
        fn moving_the_centre_loses_nothing_that_has_room(own: Id, other: Id, ids in vec(any::<Id>(), 0..20)) {
            let mut table = RoutingTable::new(own);
            for id in &ids {
                table.insert(node(*id));
            }
            let before = table.len();
            table.move_to(other);
            prop_assert_eq!(table.len(), before);
        }
    }
}
