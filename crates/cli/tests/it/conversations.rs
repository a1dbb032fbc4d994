//! Where the turns of a conversation go.

use engine::MockOptions;
use protocol::PublicKey;
use protocol::infer::{Input, Message, Role};
use protocol::membership::CERTIFICATE_LIFE;
use protocol::usage::TokenUsage;
use rpc::ResponseStream;
use tokio::time;

use crate::memory_network::{Network, SECOND, job};

impl Network {
    /// Says the last of some messages; returns the answer and the worker that gave it.
    async fn say(&self, number: u128, messages: &[Message]) -> (Message, PublicKey) {
        let job = job(number, Input { messages: Some(messages.to_vec()), max_tokens: Some(8), ..Input::default() });
        let chunks = self.chunks(&job).await.expect("answered");
        let text: String = chunks.into_iter().map(|chunk| chunk.payload.text).collect();
        let chosen = self.explain(&job).await.attempts.last().and_then(|attempt| attempt.chosen);
        (Message::new(Role::Assistant, text), chosen.expect("a worker answered"))
    }

    /// Begins a job that does not end.
    async fn occupy(&self, number: u128) -> ResponseStream {
        // A prompt of its own, or the next of them would go to where it is known.
        let prompt = Some(format!("go on, {number}"));
        let endless = Input { prompt, ..Input::default() };
        let mut stream = self.open(&job(number, endless)).await.expect("accepted");
        stream.next().await.expect("it runs").expect("and well");
        stream
    }
}

/// A network of two workers, the one that is asked first among equals, and the other.
async fn two_workers() -> (Network, PublicKey, PublicKey) {
    let mock = MockOptions { per_token: SECOND / 50, tokens: 4_000, ..MockOptions::default() };
    let network = Network::start_with(CERTIFICATE_LIFE, mock).await;
    time::sleep(SECOND * 2).await;
    let (low, high) = (network.workers[0].min(network.workers[1]), network.workers[0].max(network.workers[1]));
    (network, low, high)
}

fn user(text: &str) -> Message {
    Message::new(Role::User, text)
}

#[tokio::test(start_paused = true)]
async fn a_conversation_goes_back_to_the_worker_that_knows_it() {
    let (network, low, high) = two_workers().await;
    let other_job = network.occupy(1).await;
    let mut messages = vec![user("Tell me a long story, please.")];
    let (answer, first) = network.say(2, &messages).await;
    assert_eq!(first, high, "the other one is busy");
    drop(other_job);
    time::sleep(SECOND).await;
    messages.extend([answer, user("And then?")]);
    // Its id is the higher: without its memory it would not be asked.
    let (_, stranger) = network.say(3, &[user("Hello.")]).await;
    assert_eq!(stranger, low);
    let (_, second) = network.say(4, &messages).await;
    assert_eq!(second, high);
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_knows_a_conversation_but_has_no_slot_does_not_hold_it_up() {
    let (network, low, high) = two_workers().await;
    let mut messages = vec![user("Tell me a long story, please.")];
    let (answer, first) = network.say(1, &messages).await;
    assert_eq!(first, low);
    messages.extend([answer, user("And then?")]);
    time::sleep(SECOND).await;
    // Jobs spread evenly over equals, the first to the lowest id; half of them go again.
    let mut jobs = vec![];
    for number in 2..10 {
        jobs.push(network.occupy(number).await);
    }
    let _on_low: Vec<_> = jobs.into_iter().step_by(2).collect();
    time::sleep(SECOND).await;
    let (_, second) = network.say(20, &messages).await;
    assert_eq!(second, high, "it would have to wait at the other");
}

#[tokio::test(start_paused = true)]
async fn a_prompt_is_counted_and_nothing_is_billed() {
    let (network, ..) = two_workers().await;
    let input = Input { prompt: Some("one two three".into()), count_only: true, ..Input::default() };
    let chunks = network.chunks(&job(1, input)).await.expect("counted");
    let [only] = &chunks[..] else { panic!("{chunks:?}") };
    assert_eq!(
        (only.done, only.payload.input_tokens, only.payload.usage),
        (true, Some(3), Some(TokenUsage::default()))
    );
}
