//! What an engine process checks before its model takes memory.

use std::fs::File;
use std::time::{Duration, SystemTime};

use tokio::{task, time};

use super::memory_limit;
use crate::chat_template::ChatTemplate;
use crate::gguf::Header;
use crate::model_runtime::{Chat, ChatMessage, EngineError, MemoryPlan, Tool};

/// How much memory the template of a model may take to render a short conversation.
const PROBE_BYTES_MAX: u64 = 1 << 30;
/// How long it may take; a sound one takes a thousandth.
const PROBE_WITHIN: Duration = Duration::from_secs(10);
/// How much memory the process may take beyond its plan: for prompts on their way to tokens, adapters, templates that
/// are harmless to the probe and not to other conversations, and whatever the plan does not know of.
const BEYOND_PLAN_BYTES: u64 = 2 << 30;

/// Returns how much memory the process may allocate for a model, or refuses a model that does not fit.
pub(super) fn growth(plan: &MemoryPlan, max: Option<u64>, available: Option<u64>) -> Result<u64, EngineError> {
    let (needed_bytes, available_bytes) =
        (plan.total_bytes(), max.into_iter().chain(available).min().unwrap_or(u64::MAX));
    if needed_bytes > available_bytes {
        return Err(EngineError::OutOfMemory { needed_bytes, available_bytes });
    }
    Ok(match max {
        // What is mapped from the file is no allocation.
        Some(max) => max - plan.weights_bytes,
        None => plan.private_bytes().saturating_add(plan.later_bytes).saturating_add(BEYOND_PLAN_BYTES),
    })
}

/// Renders short conversations with the template in a model's file, under a limit of memory and time.
///
/// A template that takes too much memory ends the process, before the model has taken any; the worker then blames the
/// model. What else is wrong with a file is for the runtime to find.
pub(super) async fn probe_template(file: &File) -> Result<(), EngineError> {
    let too_much = |what: &str| EngineError::InvalidModel { reason: format!("its chat template {what}") };
    let file = file.try_clone().map_err(|error| EngineError::Failed { reason: error.to_string() })?;
    let probe = task::spawn_blocking(move || {
        let Ok(header) = Header::read(&file) else { return };
        let before = memory_limit::limit_growth(PROBE_BYTES_MAX);
        // Whether it compiles, or refuses the conversations, is of no interest here.
        if let Ok(template) = ChatTemplate::of_model(&header) {
            let render = |roles: &[&str], tools: &[Tool]| {
                let messages: Vec<_> = roles.iter().map(|role| ChatMessage::new(*role, "Hello.")).collect();
                let _ = template.render(&Chat { tools: tools.to_vec(), ..messages.into() }, SystemTime::UNIX_EPOCH);
            };
            render(&["user"], &[]);
            render(&["system", "user", "assistant", "user"], &[]);
            render(&["user"], &[Tool { name: "greet".into(), description: None, parameters: None }]);
        }
        memory_limit::restore(before);
    });
    match time::timeout(PROBE_WITHIN, probe).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(too_much("makes the renderer panic")),
        Err(_) => Err(too_much("takes too long")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: MemoryPlan = MemoryPlan {
        weights_bytes: 100,
        repacked_bytes: 0,
        kv_bytes: 30,
        compute_bytes: 20,
        cache_bytes: 0,
        process_bytes: 0,
        later_bytes: 7,
        vram_bytes: 0,
    };

    #[test]
    fn a_model_that_does_not_fit_is_refused_with_both_numbers() {
        let refused = |available_bytes| Err(EngineError::OutOfMemory { needed_bytes: 150, available_bytes });
        assert_eq!(growth(&PLAN, Some(149), None), refused(149));
        assert_eq!(growth(&PLAN, None, Some(149)), refused(149));
        assert_eq!(growth(&PLAN, Some(200), Some(140)), refused(140));
    }

    #[test]
    fn what_is_mapped_is_not_counted_as_allocated() {
        assert_eq!(growth(&PLAN, Some(150), Some(150)), Ok(50));
        assert_eq!(growth(&PLAN, None, None), Ok(57 + BEYOND_PLAN_BYTES));
    }
}
