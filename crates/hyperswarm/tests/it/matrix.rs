//! Every pair of worlds on every DHT. Those with a Node peer run in `make interop`.

use crate::net::Kind;
use crate::peers::World;
use crate::scenarios::{self, Pair};

macro_rules! pair {
    ($(#[$attribute:meta])* $name:ident: $client:ident to $server:ident on $kind:ident) => {
        mod $name {
            use super::*;

            const CLIENT: World = World::$client;
            const SERVER: World = World::$server;

            async fn met() -> Pair {
                Pair::start(CLIENT, SERVER, Kind::$kind).await
            }

            async fn connected() -> Pair {
                Pair::connected(CLIENT, SERVER, Kind::$kind).await
            }

            #[tokio::test]
            $(#[$attribute])*
            async fn requests_are_answered() {
                scenarios::requests_are_answered(connected().await).await;
            }

            #[tokio::test]
            $(#[$attribute])*
            async fn requests_pass_in_batches_and_events_without_answer() {
                scenarios::requests_pass_in_batches_and_events_without_answer(connected().await).await;
            }

            #[tokio::test]
            $(#[$attribute])*
            async fn errors_tell_code_cause_and_context() {
                scenarios::errors_tell_code_cause_and_context(connected().await).await;
            }

            #[tokio::test]
            $(#[$attribute])*
            async fn the_largest_message_passes_and_one_byte_more_is_refused() {
                let pair = connected().await;
                scenarios::the_largest_message_passes_and_one_byte_more_is_refused(pair, CLIENT, SERVER).await;
            }

            #[tokio::test]
            $(#[$attribute])*
            async fn two_hundred_connections_in_a_row_and_beside_each_other() {
                scenarios::two_hundred_connections_in_a_row_and_beside_each_other(met().await).await;
            }

            #[tokio::test]
            $(#[$attribute])*
            async fn a_client_comes_back_with_its_key_twenty_times() {
                scenarios::a_client_comes_back_with_its_key_twenty_times(met().await).await;
            }

            #[tokio::test]
            $(#[$attribute])*
            async fn a_server_that_listens_again_is_found_again() {
                scenarios::a_server_that_listens_again_is_found_again(met().await, SERVER).await;
            }

            #[tokio::test]
            $(#[$attribute])*
            async fn records_of_one_are_found_by_the_other() {
                scenarios::records_of_one_are_found_by_the_other(met().await).await;
            }

            #[tokio::test]
            $(#[$attribute])*
            async fn the_network_outlives_its_first_node() {
                scenarios::the_network_outlives_its_first_node(met().await, CLIENT).await;
            }
        }
    };
}

// Two Node peers show that a failure elsewhere is ours.
pair! { #[ignore = "needs Node: make interop"] node_to_node_on_node: Node to Node on Node }
pair! { rust_to_rust_on_rust: Rust to Rust on Rust }
pair! { #[ignore = "needs Node: make interop"] rust_to_rust_on_node: Rust to Rust on Node }
pair! { #[ignore = "needs Node: make interop"] rust_to_rust_on_both: Rust to Rust on Mixed }
pair! { #[ignore = "needs Node: make interop"] rust_to_node_on_node: Rust to Node on Node }
pair! { #[ignore = "needs Node: make interop"] rust_to_node_on_rust: Rust to Node on Rust }
pair! { #[ignore = "needs Node: make interop"] rust_to_node_on_both: Rust to Node on Mixed }
pair! { #[ignore = "needs Node: make interop"] node_to_rust_on_node: Node to Rust on Node }
pair! { #[ignore = "needs Node: make interop"] node_to_rust_on_rust: Node to Rust on Rust }
pair! { #[ignore = "needs Node: make interop"] node_to_rust_on_both: Node to Rust on Mixed }
