//! A thread that owns a connection, and the bounded queue that leads to it.

use std::io;
use std::thread::JoinHandle;
use std::time::Duration;

use rusqlite::Connection;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time;

use super::StoreOptions;
use crate::store::StoreError;

/// What waits for the thread.
pub(super) type Tasks = mpsc::Receiver<Task>;

/// Something for the thread to do.
pub(super) enum Task {
    /// Run an operation and answer its caller.
    Run(Box<dyn Operation>),
    /// Take no more, finish what waits, and end.
    Close,
}

/// What a caller wants done, and the way back to it.
pub(super) trait Operation: Send {
    /// Runs it and keeps the outcome. It may run again after its changes were rolled back.
    fn run(&mut self, connection: &Connection) -> rusqlite::Result<()>;

    /// Tells the caller the outcome, or why it is void.
    fn answer(self: Box<Self>, void: Result<(), StoreError>);
}

struct Call<F, T> {
    run: F,
    outcome: Option<T>,
    reply: oneshot::Sender<Result<T, StoreError>>,
}

impl<T, F> Operation for Call<F, T>
where
    T: Send,
    F: Fn(&Connection) -> rusqlite::Result<T> + Send,
{
    fn run(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        self.outcome = Some((self.run)(connection)?);
        Ok(())
    }

    fn answer(self: Box<Self>, void: Result<(), StoreError>) {
        let Self { outcome, reply, .. } = *self;
        // A caller that has gone needs no answer.
        let _ = reply.send(void.and_then(|()| outcome.ok_or(StoreError::Closed)));
    }
}

/// A handle on the thread. Dropping it finishes what waits and joins the thread.
pub(super) struct DbThread {
    // Taken only by `drop`.
    tasks: Option<mpsc::Sender<Task>>,
    thread: Option<JoinHandle<()>>,
    // Closed when the thread has let go of its connection.
    finished: watch::Receiver<()>,
    patience: Duration,
}

impl DbThread {
    pub(super) fn start(
        name: &str,
        options: &StoreOptions,
        work: impl FnOnce(Tasks) + Send + 'static,
    ) -> io::Result<Self> {
        let (tasks, waiting) = mpsc::channel(options.queue_depth_max.max(1));
        let (finishing, finished) = watch::channel(());
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            work(waiting);
            drop(finishing);
        })?;
        Ok(Self { tasks: Some(tasks), thread: Some(thread), finished, patience: options.patience })
    }

    /// Has an operation run and waits for its outcome.
    pub(super) async fn call<T, F>(&self, run: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: Fn(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        let (reply, outcome) = oneshot::channel();
        self.send(Task::Run(Box::new(Call { run, outcome: None, reply }))).await?;
        // The thread drops what it cannot answer only when it ends.
        outcome.await.unwrap_or(Err(StoreError::Closed))
    }

    async fn send(&self, task: Task) -> Result<(), StoreError> {
        let tasks = self.tasks.as_ref().ok_or(StoreError::Closed)?;
        match tasks.try_send(task) {
            Ok(()) => Ok(()),
            Err(TrySendError::Closed(_)) => Err(StoreError::Closed),
            Err(TrySendError::Full(task)) => match time::timeout(self.patience, tasks.send(task)).await {
                Ok(sent) => sent.map_err(|_| StoreError::Closed),
                Err(_) => Err(StoreError::Overloaded),
            },
        }
    }

    /// Finishes what waits and returns when the connection is closed.
    pub(super) async fn close(&self) {
        if let Some(tasks) = &self.tasks {
            // Not bounded by patience: the thread takes this when it has done what came before. It fails only where
            // it is closed.
            let _ = tasks.send(Task::Close).await;
        }
        let mut finished = self.finished.clone();
        while finished.changed().await.is_ok() {}
    }
}

impl Drop for DbThread {
    fn drop(&mut self) {
        // Without a sender the thread ends by itself when it has done what waits.
        self.tasks.take();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported when it happened; its callers got `Closed`.
            let _ = thread.join();
        }
    }
}

/// Runs reads one by one until it is closed.
pub(super) fn read_all(connection: &Connection, mut tasks: Tasks) {
    while let Some(task) = tasks.blocking_recv() {
        match task {
            Task::Run(mut operation) => {
                let outcome = operation.run(connection).map_err(StoreError::from);
                operation.answer(outcome);
            }
            Task::Close => tasks.close(),
        }
    }
}
