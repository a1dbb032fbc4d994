//! Whether the time of a check tells anything of a token's secret.

use std::time::Instant;

use protocol::token::{ApiToken, RANDOM_BYTES, TokenKind};

use crate::{new_token, test};

const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
const CHECKS: usize = 40_000;
const GUESSES: u64 = 1_000;
/// The limit of the usual test for leaks by time.
const T_MAX: f64 = 4.5;

/// Returns the token with this key id and secret, by the bytes that make it.
fn token(key_id: &str, secret: &str) -> ApiToken {
    let mut number = [0_u8; RANDOM_BYTES];
    for digit in key_id.bytes().chain(secret.bytes()).rev() {
        let mut carry = ALPHABET.iter().position(|letter| *letter == digit).expect("a digit") as u32;
        for byte in number.iter_mut().rev() {
            let value = u32::from(*byte) * 62 + carry;
            *byte = value as u8;
            carry = value >> 8;
        }
    }
    ApiToken::generate(TokenKind::Live, &number)
}

/// Returns the secret with its characters from a position on in another order. All guesses have the same characters:
/// how long those take to read is no news to whoever sends them.
fn shuffled(secret: &str, from: usize, seed: u64) -> String {
    let mut letters: Vec<char> = secret.chars().collect();
    let mut state = seed;
    for last in (from + 1..letters.len()).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        letters.swap(last, from + (state >> 33) as usize % (last - from + 1));
    }
    letters.into_iter().collect()
}

/// Returns wrong tokens of which the secret is right up to a position.
fn guesses(issued: &ApiToken, right: usize) -> Vec<String> {
    let secrets = (0..GUESSES).map(|seed| shuffled(issued.secret(), right, seed));
    let wrong = secrets.filter(|secret| secret != issued.secret());
    wrong.map(|secret| token(issued.key_id(), &secret).to_string()).collect()
}

/// Welch's t of two samples, without the slowest tenth of both.
fn t_of(samples: &[Vec<f64>; 2]) -> f64 {
    let mut all: Vec<f64> = samples.concat();
    all.sort_by(f64::total_cmp);
    let slowest = all[all.len() * 9 / 10];
    let [left, right] = samples.each_ref().map(|sample| {
        let kept: Vec<f64> = sample.iter().copied().filter(|time| *time < slowest).collect();
        let count = kept.len() as f64;
        let mean = kept.iter().sum::<f64>() / count;
        (mean, kept.iter().map(|time| (time - mean).powi(2)).sum::<f64>() / (count - 1.0) / count)
    });
    (left.0 - right.0) / (left.1 + right.1).sqrt()
}

#[test]
fn a_token_is_made_again_from_its_parts() {
    let made = ApiToken::generate(TokenKind::Live, &[0x5a; RANDOM_BYTES]);
    assert_eq!(token(made.key_id(), made.secret()).to_string(), made.to_string());
}

#[tokio::test]
#[ignore = "measures time: docs/benchmarks.md"]
async fn the_time_of_a_check_does_not_tell_how_much_of_a_secret_is_right() {
    let test = test().await;
    let issued: ApiToken = test.tokens.issue(new_token(None)).await.expect("issued").token.parse().expect("a token");
    let guesses = [guesses(&issued, 24), guesses(&issued, 0)];
    let mut samples = [vec![], vec![]];
    for round in 0..CHECKS {
        // Neither is always first, so that what the machine does meanwhile meets both.
        let which = (round ^ (round / 2)) % 2;
        let began = Instant::now();
        let outcome = test.tokens.check(&guesses[which][round / 2 % guesses[which].len()]).await;
        samples[which].push(began.elapsed().as_nanos() as f64);
        assert!(outcome.is_err());
    }
    let t = t_of(&samples);
    println!("{CHECKS} checks: |t| = {:.2}", t.abs());
    assert!(t.abs() < T_MAX, "t = {t}");
}
