//! Requests between the nodes of a Kademlia table.
