use futures_util::FutureExt as _;
use proptest::prelude::*;
use protocol::ErrorCode;

use super::*;

fn key(number: u128) -> JobKey {
    JobKey {
        tenant_id: "acme".parse().expect("tenant"),
        correlation_id: protocol::CorrelationId(uuid::Uuid::from_u128(number)),
        retry_token: "r".parse().expect("token"),
    }
}

fn begin(answers: &Arc<Answers>) -> (Writer, Reader) {
    let Found::Nothing(writer, reader) = answers.enter(&key(1), [1; 32]) else { panic!("nothing runs") };
    (writer, reader)
}

fn again(answers: &Arc<Answers>) -> Reader {
    let Found::Answer(reader) = answers.enter(&key(1), [1; 32]) else { panic!("it is there") };
    reader
}

fn read(completion_tokens: u32) -> TokenUsage {
    TokenUsage { completion_tokens, ..TokenUsage::default() }
}

async fn push(writer: &Writer, number: u8) {
    writer.push(Bytes::from(vec![number]), read(number.into())).await;
}

fn chunk(next: Option<Next>) -> u8 {
    let Some(Next::Chunk(chunk, usage)) = next else { panic!("{next:?}") };
    assert_eq!(usage, read(chunk[0].into()));
    chunk[0]
}

#[tokio::test]
async fn each_reader_reads_from_the_first_chunk_to_the_end() {
    let answers = Arc::default();
    let (writer, mut first) = begin(&answers);
    push(&writer, 1).await;
    assert_eq!(chunk(first.next().now_or_never()), 1);
    assert_eq!(first.next().now_or_never(), None);
    let mut second = again(&answers);
    push(&writer, 2).await;
    writer.end(Ok(()));
    writer.end(Err(WireError::new(ErrorCode::InternalError, "a second end")));
    assert_eq!([1, 2].map(|_| chunk(second.next().now_or_never())), [1, 2]);
    assert_eq!(chunk(first.next().now_or_never()), 2);
    for reader in [&mut first, &mut second] {
        assert_eq!(reader.next().now_or_never(), Some(Next::End(Ok(()))));
    }
}

#[tokio::test(start_paused = true)]
async fn a_complete_answer_stays_for_a_while_and_a_failed_one_does_not() {
    let answers: Arc<Answers> = Arc::default();
    let (writer, _) = begin(&answers);
    writer.begin(Origin { created_at: UnixMillis(5), replayed: false, attached: false });
    push(&writer, 1).await;
    writer.end(Ok(()));
    drop(writer);
    let mut late = again(&answers);
    assert_eq!(chunk(late.next().now_or_never()), 1);
    assert_eq!(late.origin(), Some(Origin { created_at: UnixMillis(5), replayed: true, attached: false }));
    time::advance(STAYS).await;
    answers.sweep();
    assert_eq!(answers.bytes.load(Ordering::Relaxed), 1, "somebody reads it");
    drop(late);
    assert_eq!(answers.bytes.load(Ordering::Relaxed), 0);
    let (writer, reader) = begin(&answers);
    push(&writer, 1).await;
    drop(reader);
    writer.end(Err(WireError::new(ErrorCode::WorkerFailed, "died")));
    drop(writer);
    assert!(matches!(answers.enter(&key(1), [2; 32]), Found::Nothing(..)), "the next job may run");
    assert_eq!(answers.bytes.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn another_request_under_the_key_is_told_apart() {
    let answers = Arc::default();
    let (writer, _reader) = begin(&answers);
    writer.begin(Origin { created_at: UnixMillis(5), replayed: false, attached: false });
    assert!(matches!(answers.enter(&key(1), [2; 32]), Found::Other));
    assert!(matches!(answers.enter(&key(2), [2; 32]), Found::Nothing(..)));
}

#[tokio::test]
async fn a_call_of_another_request_waits_until_the_first_is_known() {
    let answers: Arc<Answers> = Arc::default();
    let (writer, _reader) = begin(&answers);
    let Found::Undecided(undecided) = answers.enter(&key(1), [2; 32]) else { panic!("nothing is known yet") };
    let mut decided = Box::pin(undecided.decided());
    assert!((&mut decided).now_or_never().is_none());
    writer.begin(Origin { created_at: UnixMillis(5), replayed: false, attached: false });
    decided.await;
    assert!(matches!(answers.enter(&key(1), [2; 32]), Found::Other));
    drop(writer);
    assert!(matches!(answers.enter(&key(1), [2; 32]), Found::Nothing(..)));
}

#[tokio::test]
async fn readers_of_a_job_that_is_dropped_are_told() {
    let answers = Arc::default();
    let (writer, mut reader) = begin(&answers);
    drop(writer);
    assert!(matches!(reader.next().now_or_never(), Some(Next::End(Err(_)))));
}

#[tokio::test(start_paused = true)]
async fn a_tenant_has_few_jobs_without_a_reader() {
    let answers: Arc<Answers> = Arc::default();
    let begin = |number| {
        let Found::Nothing(writer, reader) = answers.enter(&key(number), [1; 32]) else { panic!("nothing runs") };
        drop(reader);
        writer
    };
    let writers: Vec<Writer> = (0..=LINGERING_MAX as u128).map(begin).collect();
    let mut waits: Vec<_> = writers.iter().map(|writer| Box::pin(writer.abandoned(Duration::from_secs(30)))).collect();
    let last = waits.pop().expect("one more than may linger");
    assert!(waits.iter_mut().all(|wait| wait.now_or_never().is_none()));
    last.now_or_never().expect("it is given up at once");
    waits.pop();
    assert!(writers[LINGERING_MAX].abandoned(Duration::from_secs(30)).now_or_never().is_none(), "there is room");
}

#[tokio::test]
async fn progress_before_a_chunk_is_not_told_after_it() {
    let answers = Arc::default();
    let (writer, mut first) = begin(&answers);
    writer.progress(Bytes::from_static(b"before"));
    push(&writer, 1).await;
    for reader in [&mut first, &mut again(&answers)] {
        assert_eq!(chunk(reader.next().now_or_never()), 1);
        assert_eq!(reader.next().now_or_never(), None);
    }
    writer.progress(Bytes::from_static(b"after"));
    assert_eq!(first.next().now_or_never(), Some(Next::Progress(Bytes::from_static(b"after"))));
}

#[tokio::test]
async fn only_the_latest_progress_is_told() {
    let answers = Arc::default();
    let (writer, mut reader) = begin(&answers);
    writer.progress(Bytes::from_static(b"a"));
    writer.progress(Bytes::from_static(b"b"));
    assert_eq!(reader.next().now_or_never(), Some(Next::Progress(Bytes::from_static(b"b"))));
    assert_eq!(reader.next().now_or_never(), None);
}

#[tokio::test(start_paused = true)]
async fn a_job_is_abandoned_when_nobody_has_read_for_long_enough() {
    let answers = Arc::default();
    let (writer, reader) = begin(&answers);
    let linger = Duration::from_secs(30);
    let long = Duration::from_hours(1);
    assert!(time::timeout(long, writer.abandoned(linger)).await.is_err(), "somebody reads");
    drop(reader);
    assert!(time::timeout(linger / 2, writer.abandoned(linger)).await.is_err());
    let reader = again(&answers);
    assert!(time::timeout(long, writer.abandoned(linger)).await.is_err(), "somebody reads again");
    let left = Instant::now();
    drop(reader);
    writer.abandoned(linger).await;
    assert_eq!(left.elapsed(), linger);
}

#[tokio::test]
async fn what_the_reader_that_read_most_has_acknowledged_counts() {
    let answers = Arc::default();
    let (writer, first) = begin(&answers);
    let second = again(&answers);
    for (reader, tokens) in [(&first, 3), (&second, 2), (&first, 1)] {
        reader.acknowledge(read(tokens));
    }
    assert_eq!(writer.read(), read(3));
}

#[tokio::test]
async fn an_answer_that_is_too_long_goes_at_the_pace_of_its_readers() {
    let answers = Arc::default();
    let (writer, mut reader) = begin(&answers);
    let half = Bytes::from(vec![0; ANSWER_BYTES_MAX / 2]);
    for _ in 0..2 {
        writer.push(half.clone(), read(0)).await;
    }
    assert!(writer.is_whole());
    let mut third = Box::pin(writer.push(half.clone(), read(0)));
    assert!((&mut third).now_or_never().is_none(), "the reader has read nothing");
    assert!(matches!(reader.next().await, Next::Chunk(..)));
    assert!((&mut third).now_or_never().is_none(), "the chunk was not sent yet");
    reader.acknowledge(read(0));
    third.await;
    assert!(!writer.is_whole());
    assert_eq!(again(&answers).next().await, Next::TooLate);
    for _ in 0..2 {
        assert!(matches!(reader.next().now_or_never(), Some(Next::Chunk(..))));
    }
    // What is not kept whole must be read before the job ends.
    let mut is_read = Box::pin(writer.wait_until_read());
    assert!((&mut is_read).now_or_never().is_none());
    assert_eq!(reader.next().now_or_never(), Some(Next::Receipt));
    reader.receipt();
    is_read.await;
    drop((writer, reader));
    assert_eq!(answers.bytes.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn an_answer_that_nobody_reads_can_be_too_long() {
    let answers = Arc::default();
    let (writer, reader) = begin(&answers);
    writer.push(Bytes::from(vec![0; ANSWER_BYTES_MAX]), read(0)).await;
    let mut overfull = Box::pin(writer.overfull(1));
    assert!((&mut overfull).now_or_never().is_none(), "somebody reads it");
    drop(reader);
    overfull.await;
    assert!(writer.is_overfull(1) && !writer.is_overfull(0));
}

#[tokio::test]
async fn all_answers_together_have_a_bound() {
    let answers: Arc<Answers> = Arc::default();
    let (writer, reader) = begin(&answers);
    push(&writer, 1).await;
    answers.bytes.fetch_add(ANSWERS_BYTES_MAX, Ordering::Relaxed);
    assert!(push(&writer, 2).now_or_never().is_none());
    answers.bytes.fetch_sub(ANSWERS_BYTES_MAX, Ordering::Relaxed);
    push(&writer, 2).now_or_never().expect("there is room again");
    writer.end(Ok(()));
    drop((writer, reader));
    let Found::Nothing(next, _reader) = answers.enter(&key(2), [1; 32]) else { panic!("another job") };
    push(&next, 1).await;
    answers.bytes.fetch_add(ANSWERS_BYTES_MAX - 3, Ordering::Relaxed);
    push(&next, 2).now_or_never().expect("an answer that has ended gives way");
    assert!(matches!(answers.enter(&key(1), [1; 32]), Found::Nothing(..)));
}

#[tokio::test(start_paused = true)]
async fn one_tenant_does_not_evict_the_answers_of_another() {
    let answers: Arc<Answers> = Arc::default();
    let of = |tenant: &str, number| JobKey { tenant_id: tenant.parse().expect("tenant"), ..key(number) };
    let put = async |tenant: &str, number, bytes: usize| {
        let Found::Nothing(writer, _reader) = answers.enter(&of(tenant, number), [1; 32]) else { panic!("known") };
        push(&writer, 1).await;
        // The first chunk is always taken.
        writer.push(Bytes::from(vec![0; bytes]), read(1)).await;
        writer.end(Ok(()));
        time::advance(Duration::from_millis(1)).await;
    };
    put("small", 1, 1 << 20).await;
    for number in 2..70 {
        put("big", number, 7 << 20).await;
    }
    assert!(answers.bytes.load(Ordering::Relaxed) <= ANSWERS_BYTES_MAX);
    let is_there = |tenant, number| matches!(answers.enter(&of(tenant, number), [1; 32]), Found::Answer(_));
    assert!(is_there("small", 1), "though it is the oldest");
    assert!(!is_there("big", 2) && is_there("big", 69));
    // Whoever holds less takes from the one that holds most.
    put("new", 70, 7 << 20).await;
    put("new", 71, 7 << 20).await;
    assert!(is_there("small", 1) && is_there("new", 70));
}

#[tokio::test]
async fn a_call_that_joins_a_running_job_is_attached_and_a_later_one_is_a_replay() {
    let answers = Arc::default();
    let (writer, mut first) = begin(&answers);
    writer.begin(Origin { created_at: UnixMillis(7), replayed: false, attached: false });
    push(&writer, 1).await;
    let kinds = |reader: &Reader| reader.origin().map(|origin| (origin.attached, origin.replayed));
    assert_eq!(chunk(first.next().now_or_never()), 1);
    assert_eq!((kinds(&first), kinds(&again(&answers))), (Some((false, false)), Some((true, false))));
    writer.end(Ok(()));
    assert_eq!(kinds(&again(&answers)), Some((false, true)));
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(created_at: u64, chunks: Vec<Vec<u8>>) {
        let chunks: Vec<Bytes> = chunks.into_iter().map(Bytes::from).collect();
        let encoded = encode(UnixMillis(created_at), &chunks);
        prop_assert_eq!(decode(encoded), Some((UnixMillis(created_at), chunks)));
    }

    #[test]
    fn nothing_makes_the_decoder_panic(bytes: Vec<u8>) {
        let _ = decode(bytes);
    }
}
