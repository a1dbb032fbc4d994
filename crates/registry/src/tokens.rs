//! API tokens: issued once, kept as a keyed hash, checked in constant time.

use std::sync::Arc;

use hmac::{Hmac, Mac as _};
use metadata_store::{PutTokenError, RegistryStore, StoreError, TokenRecord};
use protocol::control::{TokenCreate, TokenCreated, TokenGrant, TokenInfo, TokenList, TokenRevoked};
use protocol::token::{ApiToken, RANDOM_BYTES, TokenKind};
use protocol::{Clock, ErrorCode, WireError};
use sha2::Sha256;
use subtle::ConstantTimeEq as _;

use crate::policies;

/// The HMAC key for secrets. It is kept outside the store.
#[derive(Clone)]
pub struct Pepper(pub [u8; 32]);

/// Issues, checks, lists and revokes tokens.
#[derive(Clone)]
pub struct TokenIssuer {
    store: Arc<dyn RegistryStore>,
    clock: Arc<dyn Clock>,
    pepper: Pepper,
}

/// Why a token could not be issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// The system returned no random bytes.
    #[error("could not draw random bytes")]
    Random,
    /// The token could not be stored.
    #[error("could not keep the token")]
    Put(#[from] PutTokenError),
    #[error("could not read or write the tenant's rules")]
    Store(#[from] StoreError),
}

impl TokenIssuer {
    /// Makes a token issuer on a store.
    pub fn new(store: Arc<dyn RegistryStore>, clock: Arc<dyn Clock>, pepper: Pepper) -> Self {
        Self { store, clock, pepper }
    }

    /// Issues a token and returns it this once: only its hash is stored.
    pub async fn issue(&self, new: TokenCreate) -> Result<TokenCreated, IssueError> {
        if let Some(limit) = new.requests_per_minute {
            let mut policy = policies::of(&*self.store, &new.tenant_id).await?;
            policy.requests_per_minute = (limit > 0).then_some(limit);
            self.store.put_policy(&new.tenant_id, &policy).await?;
        }
        let mut random = [0; RANDOM_BYTES];
        getrandom::fill(&mut random).map_err(|_| IssueError::Random)?;
        let token = ApiToken::generate(TokenKind::Live, &random);
        let record = TokenRecord {
            key_id: token.key_id().to_owned(),
            tenant_id: new.tenant_id.clone(),
            hash: self.hash(&token),
            scopes: new.scopes,
            name: new.name,
            created_at: self.clock.now(),
            expires_at: new.expires_at,
            revoked_at: None,
        };
        self.store.put_token(record).await?;
        Ok(TokenCreated { token: token.to_string(), key_id: token.key_id().to_owned(), tenant_id: new.tenant_id })
    }

    /// Returns what a token allows. Every refusal has the same message, so that guesses reveal nothing.
    pub async fn check(&self, text: &str) -> Result<TokenGrant, WireError> {
        let token: ApiToken = text.parse().map_err(|_| refused())?;
        let record = self.store.token(token.key_id()).await.map_err(|error| unavailable(&error))?;
        // An unknown key id costs the same work as a wrong secret.
        let kept = record.as_ref().map_or([0; 32], |record| record.hash);
        let matches: bool = self.hash(&token).ct_eq(&kept).into();
        let record = record.filter(|_| matches).ok_or_else(refused)?;
        let now = self.clock.now();
        if record.revoked_at.is_some() || record.expires_at.is_some_and(|end| end <= now) {
            return Err(refused());
        }
        let policy = policies::of(&*self.store, &record.tenant_id).await.map_err(|error| unavailable(&error))?;
        Ok(TokenGrant {
            key_id: record.key_id,
            tenant_id: record.tenant_id,
            scopes: record.scopes,
            policy,
            expires_at: record.expires_at,
        })
    }

    /// Lists every token, without its secret.
    pub async fn list(&self) -> Result<TokenList, StoreError> {
        let info = |token: TokenRecord| TokenInfo {
            key_id: token.key_id,
            tenant_id: token.tenant_id,
            name: token.name,
            scopes: token.scopes,
            created_at: token.created_at,
            expires_at: token.expires_at,
            revoked_at: token.revoked_at,
        };
        Ok(TokenList { tokens: self.store.tokens().await?.into_iter().map(info).collect() })
    }

    pub async fn revoke(&self, key_id: &str) -> Result<TokenRevoked, StoreError> {
        Ok(TokenRevoked { found: self.store.revoke_token(key_id, self.clock.now()).await? })
    }

    fn hash(&self, token: &ApiToken) -> [u8; 32] {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.pepper.0).expect("HMAC takes keys of any length");
        mac.update(token.secret().as_bytes());
        mac.finalize().into_bytes().into()
    }
}

fn refused() -> WireError {
    WireError::new(ErrorCode::InvalidApiKey, "the API key is wrong, revoked or expired")
}

fn unavailable(error: &StoreError) -> WireError {
    tracing::warn!(%error, "could not read the registry's store");
    WireError::new(ErrorCode::Unavailable, "keys cannot be checked now, try again")
}
