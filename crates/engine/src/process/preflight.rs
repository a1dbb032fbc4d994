//! The checks that an engine process makes before its model takes memory.

use std::fs::File;
use std::time::{Duration, SystemTime};

use tokio::{task, time};

use crate::chat_template::ChatTemplate;
use crate::gguf::Header;
use crate::memory_plan;
use crate::model_runtime::{
    Chat, EngineError, LoadOptions, MemoryPlan, Message, ModelRuntime, Role, Tool, VerifiedArtifact,
};

/// The maximum memory for reading a model's header and rendering short conversations with its template.
pub(super) const TRIAL_BYTES_MAX: u64 = 1 << 30;
/// The time limit for that. A sound template takes a thousandth of it.
const TRIAL_TIMEOUT: Duration = Duration::from_secs(10);
/// Memory that the process may take beyond its plan: for tokenising prompts, for adapters, for templates that are
/// harmless to the trial but not with other conversations, and for anything the plan does not know of.
const BEYOND_PLAN_BYTES: u64 = 2 << 30;

/// Returns options that fit the available memory with a tenth to spare, and their plan: the given ones if they fit,
/// or else smaller ones. Values that are set explicitly are kept. If no options fit, the smallest are returned and
/// will be rejected.
pub(super) async fn fit(
    runtime: &impl ModelRuntime,
    artifact: &VerifiedArtifact,
    options: LoadOptions,
    available: Option<u64>,
) -> Result<(LoadOptions, MemoryPlan), EngineError> {
    let plan = runtime.estimate(artifact, &options).await?;
    let spared = available.map(|bytes| bytes - bytes / 10);
    let budget = options.memory_max_bytes.into_iter().chain(options.fit_bytes).chain(spared).min();
    let Some(budget) = budget.filter(|budget| plan.total_bytes() > *budget) else { return Ok((options, plan)) };
    let file = artifact.file.try_clone().map_err(|error| EngineError::Failed { reason: error.to_string() })?;
    let header = task::spawn_blocking(move || Header::read(&file)).await;
    let Ok(Ok(header)) = header else { return Ok((options, plan)) };
    let shape = memory_plan::shape(&header, &options)?;
    let mut smallest = (options, plan);
    for options in memory_plan::smaller(&smallest.0, shape.context_length) {
        let plan = runtime.estimate(artifact, &options).await?;
        let fits = plan.total_bytes() <= budget;
        smallest = (options, plan);
        if fits {
            break;
        }
    }
    Ok(smallest)
}

/// Returns the memory that the process may allocate for a model, or an error if the model does not fit.
pub(super) fn growth(plan: &MemoryPlan, max: Option<u64>, available: Option<u64>) -> Result<u64, EngineError> {
    let (needed_bytes, available_bytes) =
        (plan.total_bytes(), max.into_iter().chain(available).min().unwrap_or(u64::MAX));
    if needed_bytes > available_bytes {
        return Err(EngineError::OutOfMemory { needed_bytes, available_bytes });
    }
    Ok(match max {
        // Pages mapped from the file are not allocations.
        Some(max) => max - plan.weights_bytes,
        None => plan.private_bytes().saturating_add(plan.later_bytes).saturating_add(BEYOND_PLAN_BYTES),
    })
}

/// Renders short conversations with the template in a model's file, within a limited time.
///
/// Call it within [`TRIAL_BYTES_MAX`]: a template that takes too much memory ends the process before the model takes
/// any; the worker then blames the model. The runtime finds all other faults in the file.
pub(super) async fn try_template(file: &File) -> Result<(), EngineError> {
    let too_much = |what: &str| EngineError::InvalidModel { reason: format!("its chat template {what}") };
    let file = file.try_clone().map_err(|error| EngineError::Failed { reason: error.to_string() })?;
    let trial = task::spawn_blocking(move || {
        let Ok(header) = Header::read(&file) else { return };
        // It does not matter here whether the template compiles or rejects the conversations.
        if let Ok(template) = ChatTemplate::of_model(&header) {
            let render = |roles: &[Role], tools: &[Tool]| {
                let messages: Vec<_> = roles.iter().map(|role| Message::new(*role, "Hello.")).collect();
                let _ = template.render(&Chat { tools: tools.to_vec(), ..messages.into() }, SystemTime::UNIX_EPOCH);
            };
            render(&[Role::User], &[]);
            render(&[Role::System, Role::User, Role::Assistant, Role::User], &[]);
            render(&[Role::User], &[Tool { name: "greet".into(), description: None, parameters: None }]);
        }
    });
    match time::timeout(TRIAL_TIMEOUT, trial).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(too_much("makes the renderer panic")),
        Err(_) => Err(too_much("takes too long")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::{ChildCommand, ProcessRuntime};

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

    #[tokio::test]
    async fn the_room_that_nobody_set_shrinks_until_it_fits() {
        let command = ChildCommand { program: "none".into(), args: vec![], envs: vec![] };
        let runtime = ProcessRuntime::new(command);
        let file = File::open(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny.gguf"));
        let file = file.expect("the model is there");
        let tiny = VerifiedArtifact { file, sha256: String::new(), bytes: 0, parts: vec![] };
        let fit = async |kv_tokens, available| {
            let options = LoadOptions { kv_tokens, ..LoadOptions::default() };
            let (options, plan) = fit(&runtime, &tiny, options, available).await.expect("it can be planned");
            (options.kv_tokens, plan.total_bytes())
        };
        let (_, whole) = fit(0, None).await;
        let (_, least) = fit(512, None).await;
        let spared = |bytes: u64| Some(bytes * 10 / 9 + 9);
        assert_eq!(fit(0, spared(whole)).await, (0, whole));
        assert_eq!(fit(0, spared(whole - 100)).await, (512, least));
        // Explicit values are kept, and options that cannot fit are left to be rejected.
        let (_, set) = fit(1_024, None).await;
        assert_eq!(fit(1_024, spared(least)).await, (1_024, set));
        assert_eq!(fit(0, Some(1)).await, (512, least));
        // Memory granted by the caller counts as well, and does not limit the process.
        let granted = LoadOptions { fit_bytes: Some(whole - 100), ..LoadOptions::default() };
        let (fitted, plan) = super::fit(&runtime, &tiny, granted, None).await.expect("it can be planned");
        assert_eq!((fitted.kv_tokens, plan.total_bytes(), fitted.memory_max_bytes), (512, least, None));
    }

    #[test]
    fn a_refusal_names_sizes_as_people_do_and_the_settings_that_help() {
        let refused = |needed_bytes, available_bytes| EngineError::OutOfMemory { needed_bytes, available_bytes };
        let said = refused(38_528_283_904, 314_572_800).to_string();
        assert_eq!(
            said,
            "the model needs 35.9 GiB of memory, and 300 MiB can be had; a smaller context_length or kv_tokens needs less"
        );
    }

    #[test]
    fn what_is_mapped_is_not_counted_as_allocated() {
        assert_eq!(growth(&PLAN, Some(150), Some(150)), Ok(50));
        assert_eq!(growth(&PLAN, None, None), Ok(57 + BEYOND_PLAN_BYTES));
    }
}
