use super::answers::Foreign;
use super::requests::{WAITING_MAX, is_plausible};
use super::*;
use crate::compact_encoding::Encoder;
use crate::dht_rpc::message::{
    DELAYED_PING, DOWN_HINT, FIND_NODE, INVALID_TOKEN, PING, PING_NAT, Request, Response, node_id,
};
use crate::dht_rpc::routing_table::K;
use crate::dht_rpc::tests::local;
use crate::dht_rpc::{DhtReply, DhtRequestError, Message};

fn node(number: u16) -> SocketAddrV4 {
    SocketAddrV4::new([127, 0, 0, 1].into(), number)
}

fn seed() -> [u8; 256] {
    std::array::from_fn(|index| index as u8)
}

/// A persistent node at port 1000 whose time and datagrams the test supplies.
struct Subject {
    state: State,
    now: Instant,
    calls: u64,
    sent: Vec<Outgoing>,
    ended: HashMap<CallId, Result<DhtReply, DhtRequestError>>,
    started: Vec<Job>,
}

impl Subject {
    fn new(config: Config) -> Self {
        let now = Instant::now();
        let mut state = State::new(&config, node(1_000), now, seed);
        state.bootstrapped = true;
        let (sent, ended, started) = (Vec::new(), HashMap::new(), Vec::new());
        Self { state, now, calls: 0, sent, ended, started }
    }

    fn open() -> Self {
        Self::new(local(&[]))
    }

    /// Sorts what the state has decided.
    fn take_effects(&mut self) {
        for effect in std::mem::take(&mut self.state.effects) {
            match effect {
                Effect::Send(outgoing) => self.sent.push(outgoing),
                Effect::Complete(call, outcome) => assert!(self.ended.insert(call, outcome).is_none(), "it ends once"),
                Effect::Start(job) => self.started.push(job),
                Effect::Step(..) | Effect::Reschedule => {}
            }
        }
    }

    fn sent(&mut self) -> Vec<(SocketAddrV4, Vec<u8>)> {
        self.take_effects();
        self.sent.drain(..).map(|out| (out.to, out.bytes.to_vec())).collect()
    }

    fn started(&mut self) -> Vec<Job> {
        self.take_effects();
        std::mem::take(&mut self.started)
    }

    /// Returns how a call ended, once.
    fn outcome(&mut self, (call, _): (CallId, u16)) -> Option<Result<DhtReply, DhtRequestError>> {
        self.take_effects();
        self.ended.remove(&call)
    }

    fn targets(&mut self) -> Vec<SocketAddrV4> {
        self.sent().into_iter().map(|(to, _)| to).collect()
    }

    fn call(&mut self, to: SocketAddrV4) -> (CallId, u16) {
        self.calls += 1;
        let call = CallId(self.calls);
        let tid = self.state.request(Outbound::internal(PING, to, Waiter::Call(call)), self.now).unwrap();
        (call, tid)
    }

    /// Answers a ping from this address.
    fn respond(&mut self, from: SocketAddrV4, tid: u16) {
        self.respond_to(from, tid, node(1_000));
    }

    /// Answers a ping from this address, as if it had come from `to`.
    fn respond_to(&mut self, from: SocketAddrV4, tid: u16, to: SocketAddrV4) {
        let response =
            Response { tid, to, id: Some(node_id(from)), token: None, closer_nodes: Vec::new(), error: 0, value: None };
        self.state.on_response(&Via::Server, from, response, &Bytes::new(), self.now);
    }

    /// Delivers a ping from a persistent node, which answers if it is pinged itself.
    fn hear(&mut self, from: SocketAddrV4) {
        self.meet(from, node(1_000));
        self.sent();
    }

    /// Delivers a ping from a persistent node. If the node is pinged itself, it reports this address. Returns whether
    /// it was.
    fn meet(&mut self, from: SocketAddrV4, to: SocketAddrV4) -> bool {
        self.ask(from, Request { to, ..request(PING, None) });
        let greeting =
            self.sent().into_iter().find(|(_, bytes)| matches!(Message::decode(bytes), Ok(Message::Request(_))));
        if let Some((greeted, ping)) = &greeting {
            assert_eq!(*greeted, from);
            self.respond_to(from, tid_of(ping), to);
        }
        greeting.is_some()
    }

    /// Delivers a request from an ephemeral node.
    fn ask_ephemeral(&mut self, from: SocketAddrV4, request: Request<'_>) {
        self.state.on_request(&Via::Server, from, &request, size(&request), self.now);
    }

    fn ask(&mut self, from: SocketAddrV4, request: Request<'_>) -> Option<Foreign> {
        let request = Request { id: Some(node_id(from)), ..request };
        self.state.on_request(&Via::Server, from, &request, size(&request), self.now)
    }

    /// Advances time in the steps of the timer.
    fn pass(&mut self, duration: Duration) {
        let end = self.now + duration;
        while self.now < end {
            self.now = self.state.next_deadline().min(end);
            self.state.on_time(self.now);
        }
    }
}

fn request(command: u64, value: Option<&[u8]>) -> Request<'_> {
    Request { tid: 7, to: node(1_000), id: None, token: None, internal: true, command, target: None, value }
}

/// Returns the length of a request's datagram.
fn size(request: &Request<'_>) -> usize {
    let mut bytes = Vec::new();
    request.encode(&mut bytes);
    bytes.len()
}

fn tid_of(datagram: &[u8]) -> u16 {
    u16::from_le_bytes([datagram[2], datagram[3]])
}

#[tokio::test(start_paused = true)]
async fn a_request_is_sent_four_times_and_then_fails() {
    let mut subject = Subject::open();
    let call = subject.call(node(1));
    subject.pass(Duration::from_secs(10));
    let copies = subject.sent();
    assert_eq!(copies.len(), 4);
    assert!(copies.windows(2).all(|pair| pair[0] == pair[1]), "every copy is the same");
    assert_eq!(subject.outcome(call), Some(Err(DhtRequestError::Timeout)));
    assert!(subject.state.inflight.is_empty() && subject.state.deadlines.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_response_from_elsewhere_or_with_another_number_is_ignored() {
    let mut subject = Subject::open();
    let call = subject.call(node(1));
    let tid = tid_of(&subject.sent()[0].1);
    subject.respond(node(2), tid);
    subject.respond(node(1), tid.wrapping_add(1));
    assert_eq!(subject.outcome(call), None);
    subject.respond(node(1), tid);
    assert_eq!(subject.outcome(call).unwrap().unwrap().from, node(1));
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_left_is_not_sent_for_any_more() {
    let mut subject = Subject::open();
    let (call, tid) = subject.call(node(1));
    subject.state.abandon_call(tid, call);
    subject.pass(Duration::from_secs(10));
    assert_eq!(subject.sent().len(), 1);
    assert!(subject.state.inflight.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_walk_hears_of_each_request_no_more_often_than_there_is_room_for() {
    let mut subject = Subject::open();
    subject.state.request(Outbound::internal(FIND_NODE, node(1), Waiter::Walk(WalkId(1))), subject.now).unwrap();
    subject.pass(Duration::from_secs(10));
    let steps = subject.state.effects.iter().filter(|effect| matches!(effect, Effect::Step(WalkId(1), _))).count();
    assert_eq!(steps * crate::dht_rpc::walk::NODES_MAX, WALK_STEPS);
}

#[tokio::test(start_paused = true)]
async fn requests_beyond_the_window_wait_and_too_many_are_refused() {
    let mut subject = Subject::new(Config { window_max: 3, ..local(&[]) });
    let calls: Vec<_> = (1..=5).map(|number| subject.call(node(number))).collect();
    let sent = subject.sent();
    assert_eq!(sent.len(), 3);
    subject.respond(node(1), tid_of(&sent[0].1));
    assert_eq!(subject.targets(), [node(4)], "an answer makes room");
    assert!(subject.outcome(calls[0]).unwrap().is_ok());

    let mut refused = 0;
    for _ in 0..WAITING_MAX + 10 {
        let result = subject.state.request(Outbound::internal(PING, node(9), Waiter::Nobody), subject.now);
        refused += usize::from(result == Err(DhtRequestError::Busy));
    }
    assert!(refused > 0);
    assert!(subject.state.waiting.len() <= WAITING_MAX);
    subject.state.stop();
    assert_eq!(subject.outcome(calls[1]), Some(Err(DhtRequestError::Stopped)));
}

#[tokio::test(start_paused = true)]
async fn pings_are_answered_where_they_are_to_be() {
    let mut subject = Subject::open();
    subject.ask_ephemeral(node(1), request(PING, None));
    subject.ask_ephemeral(node(2), request(PING_NAT, Some(&[0x39, 0x30])));
    subject.ask_ephemeral(node(3), request(PING_NAT, Some(&[0, 0])));
    subject.ask_ephemeral(node(4), request(DELAYED_PING, Some(&2_000_u32.to_le_bytes())));
    subject.ask_ephemeral(node(5), request(DELAYED_PING, Some(&10_001_u32.to_le_bytes())));
    assert_eq!(subject.targets(), [node(1), node(12_345)]);
    subject.pass(Duration::from_secs(2));
    assert_eq!(subject.targets(), [node(4)]);
}

#[tokio::test(start_paused = true)]
async fn a_response_says_who_is_closer_and_where_the_asker_is() {
    let mut subject = Subject::open();
    (1..=30).for_each(|number| subject.hear(node(number)));
    let target = [7; 32];
    subject.ask_ephemeral(node(40), Request { target: Some(target), ..request(FIND_NODE, None) });
    let (_, bytes) = subject.sent().remove(0);
    let Ok(Message::Response(response)) = Message::decode(&bytes) else { panic!("it is a response") };
    assert_eq!(response.to, node(40));
    assert_eq!(response.id, Some(node_id(node(1_000))));
    assert_eq!(response.closer_nodes.len(), K);
    assert!(
        response.closer_nodes.is_sorted_by_key(|node| super::super::routing_table::distance(&target, &node_id(*node)))
    );
    assert!(bytes.len() < 200);
}

#[tokio::test(start_paused = true)]
async fn a_forged_id_does_not_enter_the_table() {
    let mut subject = Subject::open();
    let forged = Request { id: Some([1; 32]), ..request(PING, None) };
    subject.state.on_request(&Via::Server, node(1), &forged, size(&forged), subject.now);
    assert!(subject.state.table.is_empty());
    subject.hear(node(1));
    assert_eq!(subject.state.routing_nodes(), [node(1)]);
}

#[tokio::test(start_paused = true)]
async fn a_host_that_shows_no_token_is_sent_no_more_than_was_sent_in_its_name() {
    let mut subject = Subject::open();
    (1..=30).for_each(|number| subject.hear(node(number)));
    let victim: SocketAddrV4 = "203.0.113.9:7".parse().unwrap();
    let value = [7; 1_000];
    let (mut asked, mut answered) = (0, 0);
    let one_second = Duration::from_secs(1);
    for second in 0..60 {
        for number in 0..300 {
            let target = Some([number as u8; 32]);
            let request = Request { internal: number % 2 == 0, target, ..request(FIND_NODE, None) };
            asked += size(&request);
            let foreign = subject.state.on_request(&Via::Server, victim, &request, size(&request), subject.now);
            if foreign.is_some() {
                // A handler answers with the peers of a topic.
                let answer = Answer { value: Some(&value), token: true, closer_nodes: true, ..Answer::default() };
                subject.state.answer(&Via::Server, victim, request.tid, target, answer, subject.now);
            }
        }
        let sent: usize = subject.sent().iter().filter(|(to, _)| *to == victim).map(|(_, bytes)| bytes.len()).sum();
        assert!(second > 0 || sent > asked, "a few answers are longer than the requests");
        answered += sent;
        subject.pass(one_second);
        subject.sent();
    }
    let bound = asked + 64 * 1_024 + 60 * 64;
    assert!(answered <= bound, "{answered} bytes to {asked}");
    assert!(answered > asked / 2, "it is still answered");
}

#[tokio::test(start_paused = true)]
async fn a_request_with_a_token_is_answered_in_full_whatever_its_host_was_sent() {
    let mut subject = Subject::open();
    (1..=30).for_each(|number| subject.hear(node(number)));
    let client: SocketAddrV4 = "203.0.113.9:7".parse().unwrap();
    let question = Request { target: Some([7; 32]), ..request(FIND_NODE, None) };
    let last = loop {
        subject.ask_ephemeral(client, question.clone());
        let (_, bytes) = subject.sent().remove(0);
        let Ok(Message::Response(response)) = Message::decode(&bytes) else { panic!("it is a response") };
        if response.error != 0 {
            break bytes;
        }
        assert_eq!(response.closer_nodes.len(), K);
    };
    let Ok(Message::Response(refusal)) = Message::decode(&last) else { panic!("it is a response") };
    assert_eq!((refusal.error, refusal.closer_nodes.len()), (INVALID_TOKEN, 0));
    assert!(last.len() <= size(&question), "{} bytes", last.len());
    for _ in 0..500 {
        subject.now += Duration::from_millis(2);
        subject.ask_ephemeral(client, Request { token: refusal.token, ..question.clone() });
        let (_, bytes) = subject.sent().remove(0);
        let Ok(Message::Response(response)) = Message::decode(&bytes) else { panic!("it is a response") };
        assert_eq!((response.error, response.closer_nodes.len()), (0, K));
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_that_asks_for_a_token_gets_the_request_once_more_with_it() {
    let mut subject = Subject::open();
    let (call, tid) = subject.call(node(1));
    let token_of = |bytes: &[u8]| match Message::decode(bytes) {
        Ok(Message::Request(request)) => (request.tid, request.token),
        other => panic!("{other:?}"),
    };
    assert_eq!(token_of(&subject.sent().remove(0).1), (tid, None));
    let refuse = |subject: &mut Subject, token| {
        let (to, from) = (node(1_000), node(1));
        let response = Response {
            tid,
            to,
            id: None,
            token: Some(token),
            closer_nodes: Vec::new(),
            error: INVALID_TOKEN,
            value: None,
        };
        subject.state.on_response(&Via::Server, from, response, &Bytes::new(), subject.now);
    };
    refuse(&mut subject, [8; 32]);
    assert_eq!(subject.outcome((call, tid)), None, "the caller still waits");
    assert_eq!(token_of(&subject.sent().remove(0).1), (tid, Some([8; 32])));
    refuse(&mut subject, [9; 32]);
    assert_eq!(subject.outcome((call, tid)).unwrap().unwrap().error, INVALID_TOKEN, "not a third time");
    assert!(subject.state.inflight.is_empty());

    // The next request about a target has the token from the start, as long as it is fresh.
    let ask = |subject: &mut Subject| {
        let request = Outbound { target: Some([1; 32]), ..Outbound::internal(FIND_NODE, node(1), Waiter::Nobody) };
        subject.state.request(request, subject.now).unwrap();
        let (_, bytes) = subject.sent().remove(0);
        token_of(&bytes).1
    };
    assert_eq!(ask(&mut subject), Some([9; 32]));
    subject.now += Duration::from_secs(7);
    assert_eq!(ask(&mut subject), None);
}

#[tokio::test(start_paused = true)]
async fn requests_do_not_change_the_address_that_a_node_takes_for_its_own() {
    let mut subject = Subject::open();
    let wrong: SocketAddrV4 = "203.0.113.9:1000".parse().unwrap();
    for host in 1..=200 {
        let from = SocketAddrV4::new([10, 0, 0, host].into(), 1);
        subject.ask(from, Request { to: wrong, ..request(PING, None) });
    }
    assert_eq!(subject.state.remote_address(), Some(node(1_000)));
    assert!(subject.state.table.is_empty(), "whoever has not answered is not in the table");
}

#[tokio::test(start_paused = true)]
async fn a_host_with_many_nodes_does_not_change_the_address_that_a_node_takes_for_its_own() {
    let mut subject = Subject::open();
    for host in 1..=3 {
        assert!(subject.meet(SocketAddrV4::new([10, 0, 0, host].into(), 1), node(1_000)));
    }
    let wrong: SocketAddrV4 = "203.0.113.9:1000".parse().unwrap();
    let met = (1..=40).filter(|port| subject.meet(SocketAddrV4::new(*wrong.ip(), *port), wrong)).count();
    assert!(met > 13, "they answer, so they enter the table");
    assert_eq!(subject.state.remote_address(), Some(node(1_000)));
}

#[tokio::test(start_paused = true)]
async fn a_configured_address_wins_over_what_all_others_report() {
    let public: SocketAddrV4 = "198.51.100.7:49737".parse().unwrap();
    let own: SocketAddrV4 = "198.51.100.7:1000".parse().unwrap();
    let mut subject = Subject::new(Config { public_address: Some(public), ..local(&[node(50)]) });
    assert_eq!(subject.state.id(), Some(node_id(own)));
    for host in 1..=40 {
        subject.meet(SocketAddrV4::new([10, 0, 0, host].into(), 1), node(1_000));
    }
    assert_eq!(subject.state.sampler.host_and_port(), Some(node(1_000)));
    assert_eq!(subject.state.remote_address(), Some(own));
}

#[tokio::test(start_paused = true)]
async fn forged_requests_cause_few_pings_and_leave_places_for_others() {
    let mut subject = Subject::open();
    let pings = |subject: &mut Subject| {
        let sent = subject.sent().into_iter();
        sent.filter(|(_, bytes)| matches!(Message::decode(bytes), Ok(Message::Request(_)))).count()
    };
    for port in 1..=100 {
        subject.ask(SocketAddrV4::new([9, 9, 9, 9].into(), port), request(PING, None));
    }
    assert_eq!(pings(&mut subject), 2, "one host");
    for host in 1..=100 {
        subject.ask(SocketAddrV4::new([10, 0, 0, host].into(), 1), request(PING, None));
    }
    assert_eq!(pings(&mut subject), 14, "all hosts");
    subject.pass(Duration::from_secs(2));
    assert_eq!(pings(&mut subject), 0, "no copy is sent");
    assert!(subject.state.greetings.is_empty() && subject.state.table.is_empty());
    assert!(subject.meet("10.9.9.9:1".parse().unwrap(), node(1_000)));
    assert_eq!(subject.state.table.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_unknown_node_that_is_said_to_be_down_is_left_alone_and_a_known_one_is_asked() {
    let mut subject = Subject::open();
    (1..=2).for_each(|number| subject.hear(node(number)));
    let hint = |node: SocketAddrV4| {
        let mut value = Vec::new();
        value.write_ipv4(node);
        value
    };
    subject.ask(node(2), request(DOWN_HINT, Some(&hint(node(9)))));
    assert_eq!(subject.targets(), [node(2)]);
    subject.ask(node(2), request(DOWN_HINT, Some(&hint(node(1)))));
    assert_eq!(subject.targets(), [node(1), node(2)]);
    assert_eq!(subject.state.routing_nodes().len(), 2, "the node asks before it believes");
    subject.pass(Duration::from_secs(10));
    assert_eq!(subject.state.routing_nodes(), [node(2)]);
    assert_eq!(subject.state.checks, 0);
}

#[tokio::test(start_paused = true)]
async fn a_full_row_keeps_a_node_that_answers_and_swaps_one_that_does_not() {
    let mut subject = Subject::open();
    let own = *subject.state.table.id();
    let far = |number: &u16| (node_id(node(*number))[0] ^ own[0]) & 0x80 != 0;
    let mut numbers = (1..).filter(far);
    let members: Vec<_> = numbers.by_ref().take(K).map(node).collect();
    for member in &members {
        subject.hear(*member);
    }
    // A node that was heard just now is not suspected.
    subject.hear(node(numbers.next().unwrap()));
    assert!(subject.targets().is_empty());
    subject.state.tick += 1;

    let (first, second) = (node(numbers.next().unwrap()), node(numbers.next().unwrap()));
    assert!(subject.meet(first, node(1_000)));
    let sent = subject.sent();
    let (oldest, ping) = sent.iter().find(|(to, _)| members.contains(to)).unwrap();
    subject.respond(*oldest, tid_of(ping));
    assert!(!subject.state.routing_nodes().contains(&first));

    subject.state.tick += 1;
    subject.hear(second);
    subject.pass(Duration::from_secs(4));
    assert!(subject.state.routing_nodes().contains(&second));
    assert_eq!(subject.state.table.len(), K);
    assert_eq!(subject.state.repings, 0);
}

#[tokio::test(start_paused = true)]
async fn silent_nodes_leave_the_table_and_are_remembered_as_a_way_in() {
    let mut subject = Subject::new(local(&[node(50)]));
    (1..=3).for_each(|number| subject.hear(node(number)));
    subject.pass(Duration::from_mins(5));
    assert!(subject.state.table.is_empty());
    let entries = subject.state.entry_nodes();
    assert!([50, 1, 2, 3].iter().all(|number| entries.contains(&node(*number))), "{entries:?}");
    assert!(matches!(subject.started()[..], [Job::Refresh(_)]), "one walk at a time looks for company");
}

#[tokio::test(start_paused = true)]
async fn an_idle_node_looks_around_every_five_minutes() {
    let mut subject = Subject::open();
    subject.hear(node(1));
    let mut walks = 0;
    for _ in 0..12 * 15 {
        for (to, ping) in subject.sent() {
            subject.respond(to, tid_of(&ping));
        }
        subject.pass(Duration::from_secs(5));
        for job in subject.started() {
            walks += 1;
            subject.state.finished(job);
        }
    }
    // Three because the node is idle, and a few because it knows so few nodes.
    assert!((3..=6).contains(&walks), "{walks}");
}

#[tokio::test(start_paused = true)]
async fn a_stable_node_looks_at_its_network_once_per_address() {
    let mut subject = Subject::new(Config {
        ephemeral: None,
        firewalled: true,
        stable_after: Duration::from_secs(50),
        ..local(&[node(50)])
    });
    subject.state.sampler.add([10, 0, 0, 1].into(), node(1_000));
    subject.pass(Duration::from_secs(49));
    assert!(!subject.started().contains(&Job::CheckNetwork));
    subject.pass(Duration::from_secs(6));
    assert!(subject.started().contains(&Job::CheckNetwork));
    subject.state.finished(Job::CheckNetwork);
    subject.pass(Duration::from_mins(10));
    assert!(!subject.started().contains(&Job::CheckNetwork), "the same network again");
}

#[tokio::test(start_paused = true)]
async fn witnesses_must_agree_with_each_other_and_with_the_port() {
    let mut subject = Subject::new(Config { ephemeral: None, firewalled: true, ..local(&[node(50)]) });
    subject.state.sampler.add([10, 0, 0, 1].into(), node(2_000));
    let seen = |count: u8, address| -> Vec<_> { (1..=count).map(|host| ([10, 0, 0, host].into(), address)).collect() };
    assert!(!subject.state.on_witnesses(5, &seen(2, node(1_000))), "too few of five");
    assert!(!subject.state.on_witnesses(5, &seen(3, node(3_000))), "another port");
    assert!(!subject.state.on_witnesses(5, &seen(3, "9.9.9.9:1000".parse().unwrap())), "another host");
    assert!(subject.state.on_witnesses(5, &seen(3, node(1_000))));
    assert_eq!(subject.state.remote_address(), Some(node(1_000)));
    assert!(subject.state.settle_identity());
    assert_eq!(subject.state.id(), Some(node_id(node(1_000))));
}

#[tokio::test(start_paused = true)]
async fn nodes_that_no_honest_node_names_are_left_out() {
    let foreign: SocketAddrV4 = "8.8.8.8:1".parse().unwrap();
    let named = |text: &str, by| is_plausible(text.parse().unwrap(), by);
    assert!(named("1.2.3.4:5", foreign) && named("192.168.1.1:5", foreign));
    assert!(!named("1.2.3.4:0", foreign) && !named("0.0.0.0:5", foreign));
    assert!(!named("224.0.0.1:5", foreign) && !named("255.255.255.255:5", foreign));
    assert!(!named("127.0.0.1:5", foreign) && named("127.0.0.1:5", node(1)));
}
