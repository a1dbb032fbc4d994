//! Jobs from their submission to their settlement, against workers that can be told to misbehave.

mod batches;
mod billing;
mod builds;
mod busy_store;
mod continuation;
mod crashes;
mod dead_letters;
mod evil_worker;
mod failures;
mod hedging;
mod jobs;
mod kept;
mod membership;
mod operations;
mod presence;
mod progress;
mod queue;
mod quotas;
mod redis;
mod relay;
mod repeats;
mod stand;
