//! Peers of this crate, with the methods of the Node scripts.

use std::collections::{BTreeSet, HashMap};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use parking_lot::Mutex;
use tether_hyperswarm::crypto::{KeyPair, PublicKey, hash};
use tether_hyperswarm::hyperdht::{Config, ConnectOptions, HyperDht, ServerOptions, records};
use tether_hyperswarm::protomux::{self, Protomux};
use tether_hyperswarm::rpc::{
    self, Cause, IncomingRequest, RemoteError, RequestError, Requests, Rpc, decode_buffer, encode_buffer,
};
use tether_hyperswarm::secret_stream::SecretStream;
use tokio::time;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::failure::Failure;
use crate::pattern::pattern;
use crate::peers::Target;

/// A node of the DHT, and the key that it announces with.
pub(crate) struct RustNode {
    dht: HyperDht,
    keys: KeyPair,
}

impl RustNode {
    async fn start(bootstrap: &[String], seed: [u8; 32], ephemeral: bool, firewalled: bool) -> Self {
        let config = Config {
            bind: SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0),
            bootstrap: bootstrap.iter().map(|address| address.parse().expect("an address")).collect(),
            ephemeral,
            firewalled: Some(firewalled),
            ..Config::default()
        };
        let dht = HyperDht::start(config).expect("a node");
        dht.bootstrapped().await;
        Self { dht, keys: KeyPair::from_seed(&seed) }
    }

    /// A node that others find their way by.
    pub(crate) async fn persistent(bootstrap: &[String]) -> Self {
        Self::start(bootstrap, [0xee; 32], false, false).await
    }

    pub(crate) fn address(&self) -> SocketAddrV4 {
        self.dht.local_address()
    }

    pub(crate) async fn stop(&self) {
        self.dht.stop().await;
    }

    pub(crate) async fn announce(&self, topic: [u8; 32]) {
        records::announce(self.dht.rpc(), topic, &self.keys, &[], Vec::new()).await.expect("somebody keeps it");
    }

    pub(crate) async fn unannounce(&self, topic: [u8; 32]) {
        assert!(records::unannounce(self.dht.rpc(), topic, &self.keys).await > 0, "nobody kept it");
    }

    pub(crate) async fn lookup(&self, topic: [u8; 32]) -> Vec<[u8; 32]> {
        let mut found = BTreeSet::new();
        let mut lookup = records::lookup(self.dht.rpc(), topic, Vec::new());
        while let Some(reply) = lookup.next().await {
            found.extend(reply.peers.iter().map(|peer| peer.public_key.0));
        }
        found.into_iter().collect()
    }

    pub(crate) async fn immutable_put(&self, value: &[u8]) -> [u8; 32] {
        records::immutable_put(self.dht.rpc(), Bytes::copy_from_slice(value)).await.expect("somebody keeps it")
    }

    pub(crate) async fn immutable_get(&self, hash: [u8; 32]) -> Option<Vec<u8>> {
        records::immutable_get(self.dht.rpc(), hash).await.map(Vec::from)
    }

    pub(crate) async fn mutable_put(&self, value: &[u8], seq: u64) -> Result<[u8; 32], Failure> {
        let value = Bytes::copy_from_slice(value);
        records::mutable_put(self.dht.rpc(), &self.keys, seq, value).await.map_err(Failure::plain)?;
        Ok(self.keys.public_key().0)
    }

    pub(crate) async fn mutable_get(&self, key: [u8; 32], seq: u64) -> Option<(u64, Vec<u8>)> {
        let found = records::mutable_get(self.dht.rpc(), &PublicKey(key), seq, true).await?;
        Some((found.seq, found.value.to_vec()))
    }
}

/// A server with the methods of `rpc-server.js`.
pub(crate) struct RustServer {
    node: RustNode,
    shared: Arc<Shared>,
    listening: Mutex<Option<DropGuard>>,
    tasks: TaskTracker,
}

#[derive(Default)]
struct Shared {
    events: Mutex<Vec<Vec<u8>>>,
    connections: Mutex<Vec<(Protomux, Rpc)>>,
    opened: AtomicUsize,
}

impl RustServer {
    pub(crate) async fn start(bootstrap: &[String], seed: [u8; 32], firewalled: bool) -> Self {
        let node = RustNode::start(bootstrap, seed, true, firewalled).await;
        let server = Self { node, shared: Arc::default(), listening: Mutex::default(), tasks: TaskTracker::new() };
        server.listen().await;
        server
    }

    async fn listen(&self) {
        let server = self.node.dht.listen(self.node.keys.clone(), ServerOptions::default()).await.expect("listening");
        let (stop, shared, tasks) = (CancellationToken::new(), self.shared.clone(), self.tasks.clone());
        *self.listening.lock() = Some(stop.clone().drop_guard());
        self.tasks.spawn(async move {
            let key = server.public_key();
            while let Some(Some(stream)) = stop.run_until_cancelled(server.accept()).await {
                shared.opened.fetch_add(1, Ordering::Relaxed);
                tasks.spawn(serve(shared.clone(), stream, key));
            }
            server.close().await;
        });
    }

    pub(crate) fn key(&self) -> [u8; 32] {
        self.node.keys.public_key().0
    }

    pub(crate) fn address(&self) -> SocketAddrV4 {
        self.node.address()
    }

    pub(crate) fn node(&self) -> &RustNode {
        &self.node
    }

    pub(crate) fn events(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut *self.shared.events.lock())
    }

    pub(crate) fn connections(&self) -> (u64, u64) {
        let open = self.shared.connections.lock().len();
        (open as u64, self.shared.opened.load(Ordering::Relaxed) as u64)
    }

    pub(crate) async fn ask(&self, method: &str, value: &[u8]) -> Vec<Vec<u8>> {
        let clients: Vec<Rpc> = self.shared.connections.lock().iter().map(|(_, rpc)| rpc.clone()).collect();
        join_all(clients.iter().map(async |client| request(client, method, value).await.expect("an answer"))).await
    }

    pub(crate) async fn listen_again(&self) {
        self.listening.lock().take();
        // The first listener takes its announcement back before another may follow it.
        for _ in 0..100 {
            match self.node.dht.listen(self.node.keys.clone(), ServerOptions::default()).await {
                Ok(probe) => {
                    probe.close().await;
                    return self.listen().await;
                }
                Err(_) => time::sleep(Duration::from_millis(20)).await,
            }
        }
        panic!("the listener does not end");
    }

    pub(crate) fn drop_connections(&self) {
        for (mux, _) in self.shared.connections.lock().iter() {
            mux.destroy();
        }
    }

    pub(crate) async fn stop(self) {
        self.node.stop().await;
    }
}

async fn serve(shared: Arc<Shared>, stream: SecretStream, key: PublicKey) {
    let mux = Protomux::new(stream, protomux::Options::default());
    let (rpc, requests) = Rpc::open(&mux, key.as_bytes(), &rpc::Options::default()).expect("a new channel");
    mux.start();
    shared.connections.lock().push((mux.clone(), rpc.clone()));
    answer(requests, &shared.events).await;
    mux.destroy();
    mux.closed().await;
    let stream = mux.stream();
    shared.connections.lock().retain(|(other, _)| other.stream().handshake_hash() != stream.handshake_hash());
}

/// Answers until the channel is closed. Slow answers are overtaken.
async fn answer(requests: Requests, events: &Mutex<Vec<Vec<u8>>>) {
    let tasks = TaskTracker::new();
    while let Some(request) = requests.next().await {
        if request.is_event() {
            events.lock().push(value_of(&request).to_vec());
        } else if request.method() == "delay" {
            tasks.spawn(async move {
                let value = value_of(&request);
                time::sleep(Duration::from_millis(number(&value) as u64)).await;
                let _ = request.ok(&encode_buffer(&value));
            });
        } else {
            respond(request);
        }
    }
}

fn respond(request: IncomingRequest) {
    let value = value_of(&request);
    let failed = |cause| Err(RemoteError::failed(cause));
    let result = match request.method() {
        "echo" => Ok(value.to_vec()),
        "blob64k" => Ok(pattern(65_536)),
        "hash" => Ok(hash(&[&value]).to_vec()),
        "large" => Ok(pattern(number(&value))),
        "answer" => Ok([b"answered ", &value[..]].concat()),
        "fail" => failed(Cause {
            message: format!("refused {}", String::from_utf8_lossy(&value)),
            code: "E_REFUSED".into(),
            context: "the context".into(),
        }),
        "fail_without_code" => failed(Cause::new("plain", "")),
        method => Err(RemoteError::unknown_method(method)),
    };
    // A connection that is gone wants no answer, and what is too long was told to the peer.
    let _ = match result {
        Ok(value) => request.ok(&encode_buffer(&value)),
        Err(error) => request.error(&error),
    };
}

fn value_of(request: &IncomingRequest) -> Bytes {
    decode_buffer(request.value()).expect("a buffer")
}

fn number(value: &[u8]) -> usize {
    std::str::from_utf8(value).expect("digits").parse().expect("a number")
}

/// A client with the methods of `rpc-client.js`.
pub(crate) struct RustClient {
    node: RustNode,
    connections: Mutex<HashMap<String, Arc<Connection>>>,
}

struct Connection {
    mux: Protomux,
    rpc: Rpc,
    _answering: DropGuard,
    closed: CancellationToken,
}

impl RustClient {
    pub(crate) async fn start(bootstrap: &[String], seed: [u8; 32], firewalled: bool) -> Self {
        Self { node: RustNode::start(bootstrap, seed, true, firewalled).await, connections: Mutex::default() }
    }

    pub(crate) fn node(&self) -> &RustNode {
        &self.node
    }

    async fn open(&self, target: &Target) -> Result<Connection, Failure> {
        let options =
            ConnectOptions { relay_addresses: target.relay.into_iter().collect(), ..ConnectOptions::default() };
        let connected = self.node.dht.connect(&self.node.keys, PublicKey(target.key), options).await;
        let mux = Protomux::new(connected.map_err(Failure::plain)?, protomux::Options::default());
        let (rpc, requests) = Rpc::open(&mux, &target.key, &rpc::Options::default()).map_err(Failure::plain)?;
        mux.start();
        let (stop, closed) = (CancellationToken::new(), CancellationToken::new());
        let (ended, watched) = (closed.clone(), rpc.clone());
        TaskTracker::new().spawn(stop.clone().run_until_cancelled_owned(async move {
            answer(requests, &Mutex::default()).await;
            watched.closed().await;
            ended.cancel();
        }));
        Ok(Connection { mux, rpc, _answering: stop.drop_guard(), closed })
    }

    pub(crate) async fn connect(&self, name: &str, target: &Target) -> Result<(), Failure> {
        let connection = self.open(target).await?;
        self.connections.lock().insert(name.into(), Arc::new(connection));
        Ok(())
    }

    fn named(&self, name: &str) -> Arc<Connection> {
        self.connections.lock().get(name).expect("a connection of that name").clone()
    }

    pub(crate) async fn request(&self, name: &str, method: &str, value: &[u8]) -> Result<Vec<u8>, Failure> {
        request(&self.named(name).rpc, method, value).await
    }

    pub(crate) async fn hash_of_pattern(&self, name: &str, length: usize) -> Result<Vec<u8>, Failure> {
        self.request(name, "hash", &pattern(length)).await
    }

    pub(crate) async fn fetch_pattern(&self, name: &str, length: usize) -> Result<bool, Failure> {
        Ok(self.request(name, "large", length.to_string().as_bytes()).await? == pattern(length))
    }

    pub(crate) async fn batch(&self, name: &str, count: usize) -> Result<bool, Failure> {
        let connection = self.named(name);
        let values: Vec<String> = (0..count).map(|index| format!("item {index}")).collect();
        let mut asked =
            Box::pin(join_all(values.iter().map(|value| request(&connection.rpc, "echo", value.as_bytes()))));
        {
            let _held_back = connection.mux.cork();
            // Polled once, every request is written.
            assert!(futures_util::poll!(&mut asked).is_pending());
        }
        let answers = asked.await.into_iter().collect::<Result<Vec<_>, _>>()?;
        Ok(answers.iter().zip(&values).all(|(answer, value)| answer == value.as_bytes()))
    }

    pub(crate) async fn concurrent(&self, name: &str, count: usize, value: &[u8]) -> Result<usize, Failure> {
        let connection = self.named(name);
        let answers = join_all((0..count).map(|_| request(&connection.rpc, "echo", value))).await;
        let answers = answers.into_iter().collect::<Result<Vec<_>, _>>()?;
        Ok(answers.iter().filter(|answer| *answer == value).count())
    }

    pub(crate) async fn event(&self, name: &str, value: &[u8]) -> Result<(), Failure> {
        self.named(name).rpc.event("event", &encode_buffer(value)).await.map_err(|error| failure(&error))
    }

    pub(crate) async fn visit(&self, target: &Target, times: usize, parallel: usize) -> Vec<String> {
        let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        join_all((0..parallel).map(async |_| {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= times {
                    return;
                }
                if let Err(failure) = self.visit_once(target, index).await {
                    failures.lock().push(format!("{index}: {failure:?}"));
                }
            }
        }))
        .await;
        failures.into_inner()
    }

    async fn visit_once(&self, target: &Target, index: usize) -> Result<(), Failure> {
        let connection = self.open(target).await?;
        let sent = format!("visit {index}");
        let asked = request(&connection.rpc, "echo", sent.as_bytes());
        let answer = time::timeout(Duration::from_secs(20), asked).await.map_err(Failure::plain)??;
        if answer != sent.as_bytes() {
            return Err(Failure::plain("another answer"));
        }
        connection.leave().await;
        Ok(())
    }

    pub(crate) fn is_open(&self, name: &str) -> bool {
        !self.named(name).closed.is_cancelled()
    }

    pub(crate) async fn disconnect(&self, name: &str) {
        let connection = self.connections.lock().remove(name).expect("a connection of that name");
        connection.leave().await;
    }
}

impl Connection {
    async fn leave(&self) {
        self.rpc.close();
        self.mux.close();
        self.mux.closed().await;
    }
}

async fn request(rpc: &Rpc, method: &str, value: &[u8]) -> Result<Vec<u8>, Failure> {
    let answer = rpc.request(method, &encode_buffer(value)).await.map_err(|error| failure(&error))?;
    Ok(decode_buffer(&answer).expect("a buffer").to_vec())
}

fn failure(error: &RequestError) -> Failure {
    let RequestError::Remote(error) = error else { return Failure::plain(error) };
    let said = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    Failure {
        message: error.message.clone(),
        code: said(&error.code),
        context: None,
        cause: error.cause.as_ref().map(|cause| {
            Box::new(Failure {
                message: cause.message.clone(),
                code: said(&cause.code),
                context: said(&cause.context),
                cause: None,
            })
        }),
    }
}
