//! Jobs from their submission to their settlement, against workers that can be told to misbehave.

mod admission;
mod builds;
mod busy_store;
mod crashes;
mod evil_worker;
mod failures;
mod jobs;
mod presence;
mod progress;
mod stand;
