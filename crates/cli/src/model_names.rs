//! Makes names of the network out of what others call their models.

use std::path::Path;

use protocol::ModelName;

/// The longest name of a model, in bytes.
const NAME_BYTES_MAX: usize = 64;

/// Makes a name of a server's: `Qwen/Qwen3-8B` is `qwen3-8b`, `llama3.2:3b` is `llama3.2-3b`. Returns `None` where no
/// letter or digit is left.
pub fn of(served_as: &str) -> Option<ModelName> {
    let last = served_as.trim_end_matches('/').rsplit(['/', '\\']).next()?.to_lowercase();
    let last = last.strip_suffix(".gguf").unwrap_or(&last);
    let last = last.strip_suffix(":latest").unwrap_or(last);
    let mut name = String::new();
    for letter in last.chars() {
        match letter {
            'a'..='z' | '0'..='9' => name.push(letter),
            // Words are joined by one mark, and no mark stands at an end.
            _ if name.is_empty() || name.ends_with(['.', '-']) => {}
            '.' => name.push('.'),
            _ => name.push('-'),
        }
    }
    name.truncate(NAME_BYTES_MAX);
    name.trim_end_matches(['.', '-']).parse().ok()
}

/// Makes a name of a file's, without its quantisation: `SmolLM2-135M-Instruct.Q4_1.gguf` is `smollm2-135m-instruct`.
pub fn of_file(path: &Path) -> Option<ModelName> {
    let stem = path.file_stem()?.to_string_lossy().to_lowercase();
    let shorter = stem.rfind(['.', '-']).filter(|mark| is_quantisation(&stem[mark + 1..])).map(|mark| &stem[..mark]);
    shorter.and_then(of).or_else(|| of(&stem))
}

/// Returns whether a lower-case word names a type of weights, such as `q4_k_m`, `iq2_xs` or `bf16`.
pub fn is_quantisation(word: &str) -> bool {
    let digits = word.strip_prefix("iq").or_else(|| word.strip_prefix("tq")).or_else(|| word.strip_prefix('q'));
    matches!(word, "f16" | "f32" | "bf16" | "fp16" | "fp32" | "mxfp4" | "nvfp4")
        || digits.is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_servers_become_names_of_the_network() {
        for (served_as, expected) in [
            ("Qwen/Qwen2.5-7B-Instruct", Some("qwen2.5-7b-instruct")),
            ("llama3.2:3b", Some("llama3.2-3b")),
            ("nomic-embed-text:latest", Some("nomic-embed-text")),
            ("/srv/models/tiny.Q4_K_M.gguf", Some("tiny.q4-k-m")),
            ("C:\\models\\Phi 4 (mini).gguf", Some("phi-4-mini")),
            ("--..--", None),
            ("模型", None),
            ("", None),
        ] {
            assert_eq!(of(served_as).map(|name| name.to_string()).as_deref(), expected, "{served_as}");
        }
        assert_eq!(of(&"a-".repeat(60)).expect("a name").as_str().len(), 63);
    }

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
