//! Exact points of the program at which a drill kills: before and after each durable write, each dispatch and each
//! chunk. They exist only in a program that was built with the feature `failpoints`.

use super::cell::Victim;

/// A failpoint of one of the services.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Point {
    /// Its name in the program.
    pub(super) name: &'static str,
    pub(super) what: &'static str,
    /// The process that comes to it.
    pub(super) victim: Victim,
    /// Whether a job comes to it only if its worker dies.
    pub(super) needs_move: bool,
}

#[cfg(not(feature = "failpoints"))]
pub(super) const POINTS: [Point; 0] = [];

#[cfg(feature = "failpoints")]
pub(super) use built_in::POINTS;

/// Returns the command by which a node is run so that it looks for its failpoint in a file.
#[cfg(not(feature = "failpoints"))]
pub(super) fn wrapper(_: &str) -> Option<Vec<String>> {
    None
}

#[cfg(feature = "failpoints")]
pub(super) fn wrapper(file: &str) -> Option<Vec<String>> {
    Some(vec!["env".to_owned(), format!("{}={file}", failpoints::FILE)])
}

#[cfg(feature = "failpoints")]
mod built_in {
    use super::Point;
    use super::Victim::{self, Gateway, Orchestrator, Worker};

    const fn at(victim: Victim, name: &'static str, what: &'static str) -> Point {
        Point { name, what, victim, needs_move: false }
    }

    const fn moving(name: &'static str, what: &'static str) -> Point {
        Point { needs_move: true, ..at(Orchestrator, name, what) }
    }

    pub(in super::super) const POINTS: [Point; 24] = [
        at(Gateway, "gateway-submits", "the request is checked and not yet submitted"),
        at(Gateway, "gateway-begun", "the first chunk is at the gateway, and the client has nothing"),
        at(Gateway, "gateway-piece", "a chunk is at the gateway and not yet passed on"),
        at(Gateway, "gateway-last-piece", "the last chunk is at the gateway and not yet passed on"),
        at(Orchestrator, "orchestrator-admitted", "the job is admitted and has no worker"),
        at(Orchestrator, "orchestrator-reserves", "before the write of the job and its reservation"),
        at(Orchestrator, "store-reserves", "in the transaction of that write, before it is committed"),
        at(Orchestrator, "orchestrator-reserved", "after that write"),
        at(Orchestrator, "orchestrator-dispatches", "before the job is sent to its worker"),
        at(Orchestrator, "orchestrator-acknowledged", "the worker has accepted the job"),
        at(Orchestrator, "orchestrator-chunk", "a chunk has come from the worker and is not passed on"),
        at(Orchestrator, "orchestrator-chunk-sent", "a chunk is passed on and not yet in the journal"),
        moving("orchestrator-moves", "before the write that moves the job to another worker"),
        moving("orchestrator-moved", "after that write"),
        at(Orchestrator, "orchestrator-last-chunk", "the last chunk has come from the worker"),
        at(Orchestrator, "orchestrator-all-read", "the gateway has acknowledged all chunks before the last"),
        at(Orchestrator, "store-settles", "in the transaction that settles the job, before it is committed"),
        at(Orchestrator, "orchestrator-settled", "the job is settled, and its last chunk is not sent"),
        at(Orchestrator, "orchestrator-last-sent", "the last chunk is sent"),
        at(Worker, "worker-taken", "the job is admitted, and its engine has not begun"),
        at(Worker, "worker-accepted", "the call is accepted"),
        at(Worker, "worker-chunk", "a chunk is made and not yet sent"),
        at(Worker, "worker-chunk-sent", "a chunk is sent"),
        at(Worker, "worker-finishes", "the answer is complete, and its last chunk is not sent"),
    ];
}
