"""LangChain's standard tests of chat models and embeddings, by four APIs."""

import pytest
from conftest import KEY, MODEL, OPENAI, URL
from langchain_anthropic import ChatAnthropic
from langchain_ollama import ChatOllama, OllamaEmbeddings
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_tests.integration_tests import ChatModelIntegrationTests, EmbeddingsIntegrationTests

HEADERS = {"headers": {"Authorization": f"Bearer {KEY}"}}


class Standard(ChatModelIntegrationTests):
    # What the models here do not take.
    supports_image_inputs = supports_pdf_inputs = supports_audio_inputs = False
    # The mock answers `{}` where JSON of any shape is asked for.
    supports_json_mode = False

    @pytest.mark.xfail(reason="the mock calls no function that nobody wrote out")
    def test_agent_loop(self, model):
        super().test_agent_loop(model)

    @pytest.mark.xfail(reason="the mock calls functions with the simplest arguments")
    def test_unicode_tool_call_integration(self, model):
        super().test_unicode_tool_call_integration(model)


class TestChatCompletions(Standard):
    chat_model_class = ChatOpenAI
    chat_model_params = {"model": MODEL, "base_url": OPENAI, "api_key": KEY, "max_retries": 0}
    # Another server than OpenAI's is not asked for usage by default.
    chat_model_params |= {"stream_usage": True}


class TestResponses(Standard):
    chat_model_class = ChatOpenAI
    chat_model_params = TestChatCompletions.chat_model_params | {"use_responses_api": True}


class TestMessages(Standard):
    chat_model_class = ChatAnthropic
    chat_model_params = {"model": MODEL, "base_url": URL, "api_key": KEY, "max_retries": 0, "max_tokens": 256}
    supports_anthropic_inputs = False


class TestOllama(Standard):
    chat_model_class = ChatOllama
    chat_model_params = {"model": MODEL, "base_url": URL, "client_kwargs": HEADERS}
    # Ollama's API has no way to demand a call.
    has_tool_choice = False

    @pytest.mark.xfail(reason="the mock calls no function that nobody wrote out")
    def test_bind_runnables_as_tools(self, model):
        super().test_bind_runnables_as_tools(model)


class TestOpenAIEmbeddings(EmbeddingsIntegrationTests):
    embeddings_class = OpenAIEmbeddings
    embedding_model_params = {"model": MODEL, "base_url": OPENAI, "api_key": KEY, "check_embedding_ctx_length": False}


class TestOllamaEmbeddings(EmbeddingsIntegrationTests):
    embeddings_class = OllamaEmbeddings
    embedding_model_params = {"model": MODEL, "base_url": URL, "client_kwargs": HEADERS}
