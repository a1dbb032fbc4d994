//! Derives model names from file names.

use std::path::Path;

use protocol::ModelName;

/// Derives a model name from a file name, without its quantisation: `SmolLM2-135M-Instruct.Q4_1.gguf` is
/// `smollm2-135m-instruct`.
pub fn of_file(path: &Path) -> Option<ModelName> {
    let stem = path.file_stem()?.to_string_lossy().to_lowercase();
    let shorter = stem.rfind(['.', '-']).filter(|mark| is_quantisation(&stem[mark + 1..])).map(|mark| &stem[..mark]);
    shorter.and_then(ModelName::made_of).or_else(|| ModelName::made_of(&stem))
}

/// Returns whether a lower-case word names a weight type, such as `q4_k_m`, `iq2_xs` or `bf16`.
pub fn is_quantisation(word: &str) -> bool {
    let digits = word.strip_prefix("iq").or_else(|| word.strip_prefix("tq")).or_else(|| word.strip_prefix('q'));
    matches!(word, "f16" | "f32" | "bf16" | "fp16" | "fp32" | "mxfp4" | "nvfp4")
        || digits.is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_become_names_without_the_quantisation() {
        for (file, expected) in [
            ("/srv/SmolLM2-135M-Instruct.Q4_1.gguf", Some("smollm2-135m-instruct")),
            ("gemma-3-270m-q4_k_m.gguf", Some("gemma-3-270m")),
            ("Qwen3-8B-IQ2_XS.gguf", Some("qwen3-8b")),
            ("model-bf16.gguf", Some("model")),
            ("qwen2.5.gguf", Some("qwen2.5")),
            ("phi-4.gguf", Some("phi-4")),
            ("weights", Some("weights")),
            ("q4_0.gguf", Some("q4-0")),
            ("模型.gguf", None),
        ] {
            assert_eq!(of_file(Path::new(file)).map(|name| name.to_string()).as_deref(), expected, "{file}");
        }
    }
}
