//! A thread that owns a database connection, and its bounded queue.

use std::io;
use std::thread::JoinHandle;
use std::time::Duration;

use rusqlite::Connection;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time;

use super::StoreOptions;
use crate::store::StoreError;

/// The thread's queue.
pub(super) type Tasks = mpsc::Receiver<Task>;

/// A task for the thread.
pub(super) enum Task {
    /// Runs an operation and replies to its caller.
    Run(Box<dyn Operation>),
    /// Closes the queue, finishes the queued operations, and ends.
    Close,
}

/// An operation, and the channel for its outcome.
pub(super) trait Operation: Send {
    /// Runs the operation and keeps its outcome. It may run again after its changes are rolled back.
    fn run(&mut self, connection: &Connection) -> rusqlite::Result<()>;

    /// Sends the caller the outcome, or the error that voids it.
    fn reply(self: Box<Self>, void: Result<(), StoreError>);
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

    fn reply(self: Box<Self>, void: Result<(), StoreError>) {
        let Self { outcome, reply, .. } = *self;
        // A caller that is gone needs no reply.
        let _ = reply.send(void.and_then(|()| outcome.ok_or(StoreError::Closed)));
    }
}

/// A handle to the thread. Dropping it finishes the queued operations and joins the thread.
pub(super) struct DbThread {
    // Taken only by `drop`.
    tasks: Option<mpsc::Sender<Task>>,
    thread: Option<JoinHandle<()>>,
    // Closed when the thread has dropped its connection.
    finished: watch::Receiver<()>,
    queue_timeout: Duration,
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
        Ok(Self { tasks: Some(tasks), thread: Some(thread), finished, queue_timeout: options.queue_timeout })
    }

    /// Runs an operation on the thread and returns its outcome.
    pub(super) async fn call<T, F>(&self, run: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: Fn(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        let (reply, outcome) = oneshot::channel();
        self.send(Task::Run(Box::new(Call { run, outcome: None, reply }))).await?;
        // The thread drops an operation without a reply only when it ends.
        outcome.await.unwrap_or(Err(StoreError::Closed))
    }

    async fn send(&self, task: Task) -> Result<(), StoreError> {
        let tasks = self.tasks.as_ref().ok_or(StoreError::Closed)?;
        match tasks.try_send(task) {
            Ok(()) => Ok(()),
            Err(TrySendError::Closed(_)) => Err(StoreError::Closed),
            Err(TrySendError::Full(task)) => match time::timeout(self.queue_timeout, tasks.send(task)).await {
                Ok(sent) => sent.map_err(|_| StoreError::Closed),
                Err(_) => Err(StoreError::Overloaded),
            },
        }
    }

    /// Finishes the queued operations and returns when the connection is closed.
    pub(super) async fn close(&self) {
        if let Some(tasks) = &self.tasks {
            // Has no timeout: the thread receives this after the operations before it. Sending fails only if the queue
            // is already closed.
            let _ = tasks.send(Task::Close).await;
        }
        let mut finished = self.finished.clone();
        while finished.changed().await.is_ok() {}
    }
}

impl Drop for DbThread {
    fn drop(&mut self) {
        // Without a sender the thread ends by itself after the queued operations.
        self.tasks.take();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was already reported; its callers got `Closed`.
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
                operation.reply(outcome);
            }
            Task::Close => tasks.close(),
        }
    }
}
