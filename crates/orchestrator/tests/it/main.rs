//! Jobs from their submission to their settlement, against workers that can be told to misbehave.

mod failures;
mod jobs;
mod presence;
mod stand;
