//! Methods that share a state.

use protocol::WireError;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Access, Caller, Server, StreamCall};

/// A server whose handlers take a clone of a shared state, and whose methods say who may call them:
/// `server.with_state(service).unary(METHOD, Access::Members, Service::method)`.
pub struct WithState<S> {
    server: Server,
    state: S,
}

impl<S: Clone + Send + Sync + 'static> WithState<S> {
    pub(super) fn new(server: Server, state: S) -> Self {
        Self { server, state }
    }

    /// As [`Server::unary`], for the callers that `access` names.
    #[must_use]
    pub fn unary<Request, Reply, Work>(
        self,
        method: &'static str,
        access: Access,
        handler: impl Fn(S, Caller, Request) -> Work + Send + Sync + 'static,
    ) -> Self
    where
        Request: DeserializeOwned,
        Reply: Serialize,
        Work: Future<Output = Result<Reply, WireError>> + Send + 'static,
    {
        self.handle(method, access, handler, true)
    }

    /// As [`Server::unary_while_wanted`], for the callers that `access` names.
    #[must_use]
    pub fn unary_while_wanted<Request, Reply, Work>(
        self,
        method: &'static str,
        access: Access,
        handler: impl Fn(S, Caller, Request) -> Work + Send + Sync + 'static,
    ) -> Self
    where
        Request: DeserializeOwned,
        Reply: Serialize,
        Work: Future<Output = Result<Reply, WireError>> + Send + 'static,
    {
        self.handle(method, access, handler, false)
    }

    fn handle<Request, Reply, Work>(
        self,
        method: &'static str,
        access: Access,
        handler: impl Fn(S, Caller, Request) -> Work + Send + Sync + 'static,
        finishes: bool,
    ) -> Self
    where
        Request: DeserializeOwned,
        Reply: Serialize,
        Work: Future<Output = Result<Reply, WireError>> + Send + 'static,
    {
        let state = self.state.clone();
        let handler = move |caller, request| handler(state.clone(), caller, request);
        Self { server: self.server.handle_unary(method, access, handler, finishes), ..self }
    }

    /// As [`Server::stream`], for the callers that `access` names.
    #[must_use]
    pub fn stream<Work>(
        self,
        method: &'static str,
        access: Access,
        handler: impl Fn(S, StreamCall) -> Work + Send + Sync + 'static,
    ) -> Self
    where
        Work: Future<Output = ()> + Send + 'static,
    {
        let state = self.state.clone();
        Self { server: self.server.handle_streaming(method, access, move |call| handler(state.clone(), call)), ..self }
    }

    /// Returns the server with all these methods.
    #[must_use]
    pub fn into_server(self) -> Server {
        self.server
    }
}
