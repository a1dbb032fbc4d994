//! API tokens: `tth_live_<key id: 8>_<secret: 32><checksum: 6>`, all base62.
//!
//! The key id is public and identifies the token in logs and stores. The checksum detects typing errors without a
//! look-up; it does not protect against forgery. A store keeps a keyed hash of the secret.

use std::fmt;
use std::str::FromStr;

/// Number of random bytes from which a token is made.
pub const RANDOM_BYTES: usize = 48;
/// Length of the public part, in characters.
pub const KEY_ID_LENGTH: usize = 8;
/// Length of the secret part, in characters. They carry about 190 bits.
pub const SECRET_LENGTH: usize = 32;
const CHECKSUM_LENGTH: usize = 6;
/// Length of a whole token, in characters.
pub const TOKEN_LENGTH: usize = "tth_live_".len() + KEY_ID_LENGTH + 1 + SECRET_LENGTH + CHECKSUM_LENGTH;

const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// Purpose of a token. Tokens of both kinds are equally secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TokenKind {
    /// `tth_live_`: for real work.
    Live,
    /// `tth_test_`: for trials and automated tests.
    Test,
}

impl TokenKind {
    fn prefix(self) -> &'static str {
        match self {
            Self::Live => "tth_live_",
            Self::Test => "tth_test_",
        }
    }
}

/// An API token. `Display` writes the whole token; `Debug` writes only the key id.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiToken {
    kind: TokenKind,
    key_id: String,
    secret: String,
}

/// Why a text is not a token. It never quotes the text, which may be a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MalformedToken {
    /// The text does not begin with a token's prefix.
    #[error("an API token begins with tth_live_ or tth_test_")]
    Prefix,
    /// The text is shorter or longer than a token.
    #[error("an API token has {TOKEN_LENGTH} characters, not {found}")]
    Length {
        /// Number of characters in the text.
        found: usize,
    },
    /// A character is not allowed at its position.
    #[error("invalid character at position {position} of the API token")]
    Alphabet {
        /// Position of the character, from 1.
        position: usize,
    },
    /// A character was mistyped.
    #[error("the checksum does not match: a character is mistyped")]
    Checksum,
}

impl ApiToken {
    /// Makes a token from random bytes, which must come from the system's generator and be used once.
    pub fn generate(kind: TokenKind, random: &[u8; RANDOM_BYTES]) -> Self {
        // The bytes are one number, written in base 62. It has 384 bits and the token uses 238, so no digit is favoured
        // by more than one part in 2^140.
        let mut number = *random;
        let mut digits = String::with_capacity(KEY_ID_LENGTH + SECRET_LENGTH);
        for _ in 0..KEY_ID_LENGTH + SECRET_LENGTH {
            let mut rest = 0;
            for byte in &mut number {
                let value = rest << 8 | u32::from(*byte);
                *byte = (value / 62) as u8;
                rest = value % 62;
            }
            digits.push(char::from(ALPHABET[rest as usize]));
        }
        let secret = digits.split_off(KEY_ID_LENGTH);
        Self { kind, key_id: digits, secret }
    }

    /// Returns the purpose of the token.
    pub fn kind(&self) -> TokenKind {
        self.kind
    }

    /// Returns the public part. Logs contain only this part.
    pub fn key_id(&self) -> &str {
        &self.key_id
    }

    /// Returns the secret part.
    pub fn secret(&self) -> &str {
        &self.secret
    }
}

/// Returns the CRC-32 of everything before the checksum, in base 62.
fn checksum(covered: &[u8]) -> [u8; CHECKSUM_LENGTH] {
    let mut rest = crc32fast::hash(covered);
    let mut digits = [0; CHECKSUM_LENGTH];
    for digit in digits.iter_mut().rev() {
        *digit = ALPHABET[(rest % 62) as usize];
        rest /= 62;
    }
    digits
}

impl FromStr for ApiToken {
    type Err = MalformedToken;

    fn from_str(text: &str) -> Result<Self, MalformedToken> {
        let kind = [TokenKind::Live, TokenKind::Test]
            .into_iter()
            .find(|kind| text.starts_with(kind.prefix()))
            .ok_or(MalformedToken::Prefix)?;
        let found = text.chars().count();
        if found != TOKEN_LENGTH {
            return Err(MalformedToken::Length { found });
        }
        let prefix = kind.prefix().len();
        let separator = prefix + KEY_ID_LENGTH;
        let belongs = |(position, character): (usize, char)| match position {
            position if position < prefix => true,
            position if position == separator => character == '_',
            _ => character.is_ascii_alphanumeric(),
        };
        if let Some(position) = text.chars().enumerate().position(|character| !belongs(character)) {
            return Err(MalformedToken::Alphabet { position: position + 1 });
        }
        // All characters are ASCII from here on, so bytes and characters are the same.
        let (covered, written) = text.split_at(TOKEN_LENGTH - CHECKSUM_LENGTH);
        if checksum(covered.as_bytes()) != written.as_bytes() {
            return Err(MalformedToken::Checksum);
        }
        Ok(Self { kind, key_id: covered[prefix..separator].to_owned(), secret: covered[separator + 1..].to_owned() })
    }
}

impl fmt::Display for ApiToken {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let covered = format!("{}{}_{}", self.kind.prefix(), self.key_id, self.secret);
        formatter.write_str(&covered)?;
        checksum(covered.as_bytes()).iter().try_for_each(|digit| write!(formatter, "{}", char::from(*digit)))
    }
}

impl fmt::Debug for ApiToken {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "ApiToken({}{}_…)", self.kind.prefix(), self.key_id)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tokens() -> impl Strategy<Value = ApiToken> {
        let kinds = prop_oneof![Just(TokenKind::Live), Just(TokenKind::Test)];
        (kinds, prop::collection::vec(any::<u8>(), RANDOM_BYTES)).prop_map(|(kind, random)| {
            ApiToken::generate(kind, &random.try_into().expect("the strategy makes that many bytes"))
        })
    }

    proptest! {
        #[test]
        fn a_token_reads_back_as_it_is_written(token in tokens()) {
            let text = token.to_string();
            prop_assert_eq!(text.len(), TOKEN_LENGTH);
            prop_assert_eq!(text.parse::<ApiToken>(), Ok(token));
        }

        #[test]
        fn every_change_of_a_single_character_is_refused(token in tokens()) {
            let text = token.to_string();
            for position in 0..TOKEN_LENGTH {
                for character in ('\0'..='\u{ff}').filter(|character| !text[position..].starts_with(*character)) {
                    let changed = format!("{}{character}{}", &text[..position], &text[position + 1..]);
                    prop_assert!(changed.parse::<ApiToken>().is_err(), "{position} {character:?}");
                }
            }
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "(tth_live_)?.{0,60}") {
            let _ = text.parse::<ApiToken>();
        }
    }

    #[test]
    fn an_error_says_what_is_wrong() {
        let text = ApiToken::generate(TokenKind::Live, &[7; RANDOM_BYTES]).to_string();
        let refused = |text: &str| text.parse::<ApiToken>().expect_err("malformed");
        assert_eq!(refused(""), MalformedToken::Prefix);
        assert_eq!(refused(&text.replace("tth_", "sk_")), MalformedToken::Prefix);
        assert_eq!(refused(&text[..50]), MalformedToken::Length { found: 50 });
        assert_eq!(refused(&format!("{text} ")), MalformedToken::Length { found: TOKEN_LENGTH + 1 });
        assert_eq!(refused(&text.replacen(&text[20..21], "-", 1)), MalformedToken::Alphabet { position: 21 });
        assert_eq!(refused(&text.replace("live", "test")), MalformedToken::Checksum);
    }

    #[test]
    fn debug_output_and_errors_keep_the_secret() {
        let token = ApiToken::generate(TokenKind::Live, &[7; RANDOM_BYTES]);
        let shown = format!("{token:?}");
        assert!(shown.contains(token.key_id()) && !shown.contains(token.secret()), "{shown}");
        let error = token.to_string().replace("live", "test").parse::<ApiToken>().expect_err("malformed");
        assert!(!format!("{error} {error:?}").contains(token.secret()));
    }

    #[test]
    fn each_digit_comes_up_equally_often() {
        let mut counts = [0_u32; 62];
        let mut state = 1_u64;
        for _ in 0..5_000 {
            // SplitMix64, seeded, so that this test always sees the same bytes.
            let random = std::array::from_fn(|_| {
                state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                (mixed >> 40) as u8
            });
            let token = ApiToken::generate(TokenKind::Live, &random);
            for digit in token.key_id().bytes().chain(token.secret().bytes()) {
                counts[ALPHABET.iter().position(|known| *known == digit).expect("in the alphabet")] += 1;
            }
        }
        let expected = 5_000.0 * 40.0 / 62.0;
        let chi_squared: f64 = counts.iter().map(|count| (f64::from(*count) - expected).powi(2) / expected).sum();
        // With 61 degrees of freedom, chance exceeds 110 once in ten thousand.
        assert!(chi_squared < 110.0, "{chi_squared}");
    }
}
