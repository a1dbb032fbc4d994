//! Combines the runtimes of one worker: its own engines, and the servers that it has adopted.

use std::sync::Arc;

use async_trait::async_trait;
use engine::hardware::Hardware;
use engine::remote::{self, RemoteRuntime};
use engine::{
    AdapterId, EmbedRequest, Embeddings, EngineError, GenerateRequest, GenerateStream, ListedToken, LoadOptions,
    LoadSnapshot, LoadedModel, MemoryPlan, ModelId, ModelRuntime, ProgressSink, PromptInput, RerankRequest,
    RuntimeInfo, Scores, TokenListing, VerifiedArtifact,
};

/// Forwards each call to the runtime that has the model. Artifacts are loaded by the engines.
pub(crate) struct Runtimes {
    pub(crate) engines: Arc<dyn ModelRuntime>,
    pub(crate) servers: Arc<RemoteRuntime>,
}

impl Runtimes {
    fn of(&self, model: ModelId) -> &dyn ModelRuntime {
        if model.0 < remote::FIRST_ID { &*self.engines } else { &*self.servers }
    }
}

#[async_trait]
impl ModelRuntime for Runtimes {
    fn describe(&self) -> RuntimeInfo {
        self.engines.describe()
    }

    async fn hardware(&self) -> Hardware {
        self.engines.hardware().await
    }

    async fn estimate(&self, artifact: &VerifiedArtifact, options: &LoadOptions) -> Result<MemoryPlan, EngineError> {
        self.engines.estimate(artifact, options).await
    }

    async fn load(
        &self,
        artifact: VerifiedArtifact,
        options: LoadOptions,
        progress: ProgressSink,
    ) -> Result<LoadedModel, EngineError> {
        self.engines.load(artifact, options, progress).await
    }

    async fn add_adapter(&self, model: ModelId, artifact: VerifiedArtifact) -> Result<AdapterId, EngineError> {
        self.of(model).add_adapter(model, artifact).await
    }

    async fn remove_adapter(&self, model: ModelId, adapter: AdapterId) -> Result<(), EngineError> {
        self.of(model).remove_adapter(model, adapter).await
    }

    async fn unload(&self, model: ModelId) -> Result<(), EngineError> {
        self.of(model).unload(model).await
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream, EngineError> {
        self.of(request.model).generate(request).await
    }

    async fn embed(&self, request: EmbedRequest) -> Result<Embeddings, EngineError> {
        self.of(request.model).embed(request).await
    }

    async fn rerank(&self, request: RerankRequest) -> Result<Scores, EngineError> {
        self.of(request.model).rerank(request).await
    }

    async fn list_tokens(
        &self,
        model: ModelId,
        input: &PromptInput,
        listing: TokenListing,
    ) -> Result<Vec<ListedToken>, EngineError> {
        self.of(model).list_tokens(model, input, listing).await
    }

    async fn count_tokens(&self, model: ModelId, input: &PromptInput) -> Result<u32, EngineError> {
        self.of(model).count_tokens(model, input).await
    }

    fn load_state(&self) -> Vec<LoadSnapshot> {
        let mut state = self.engines.load_state();
        state.extend(self.servers.load_state());
        state
    }
}
