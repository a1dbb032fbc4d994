//! Checks whether a LoRA adapter fits a model.
//!
//! An adapter adds the product of two low-rank matrices, `lora_a` and `lora_b`, to weights of its model. llama.cpp
//! rejects some mismatches with an error. On others it aborts its process, at the latest when it evaluates the first
//! token.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use super::{Header, Tensor, Value};

/// Tensor types that ggml cannot multiply: integers and 64-bit floats.
const NOT_MULTIPLIED: RangeInclusive<u32> = 24..=28;
const INPUT: &str = "token_embd.weight";
const OUTPUT: &str = "output.weight";

/// The two factors of one change, `lora_a` and `lora_b`.
pub(crate) type AdapterPair<'a> = (&'a Tensor, &'a Tensor);

/// Checks an adapter against a model and returns what does not fit.
pub fn check_adapter(adapter: &Header, model: &Header) -> Result<(), String> {
    if adapter.text("general.type") != Some("adapter") {
        return Err("the file is not an adapter".into());
    }
    let (theirs, ours) = (adapter.architecture().unwrap_or("none"), model.architecture().unwrap_or("none"));
    if theirs != ours {
        return Err(format!("the adapter is for the architecture {theirs:?}, and the model is {ours:?}"));
    }
    if adapter.text("adapter.type") != Some("lora") {
        return Err("only adapters of the type lora are supported".into());
    }
    if adapter_alpha(adapter).is_none() {
        return Err("the adapter does not say how strong it is (adapter.lora.alpha)".into());
    }
    let pairs = adapter_pairs(adapter)?;
    if pairs.is_empty() {
        return Err("the adapter changes nothing".into());
    }
    let matrices: BTreeMap<&str, &Tensor> = model.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
    // llama.cpp would also apply the change of the input embeddings to the output, whose factors are not swapped.
    if pairs.contains_key(INPUT) && !matrices.contains_key(OUTPUT) {
        return Err("the adapter changes the embeddings of tokens, with which the model makes its logits".into());
    }
    for (name, pair) in pairs {
        let matrix = matrices.get(name).ok_or_else(|| format!("the model has no tensor {name:?}"))?;
        check_pair(pair, matrix).map_err(|problem| format!("{problem} ({name:?})"))?;
    }
    Ok(())
}

/// Returns the alpha of an adapter, which scales its changes.
pub(crate) fn adapter_alpha(adapter: &Header) -> Option<f64> {
    match adapter.metadata.get("adapter.lora.alpha") {
        Some(Value::Float(alpha)) if alpha.is_finite() => Some(*alpha),
        _ => None,
    }
}

/// Returns whether a tensor holds the token embeddings, which are looked up by row.
pub(crate) fn is_input(name: &str) -> bool {
    name.ends_with(INPUT)
}

/// Returns the two factors of each change, by the name of the tensor that it changes.
pub(crate) fn adapter_pairs(adapter: &Header) -> Result<BTreeMap<&str, AdapterPair<'_>>, String> {
    let mut halves: BTreeMap<&str, (Option<&Tensor>, Option<&Tensor>)> = BTreeMap::new();
    for tensor in &adapter.tensors {
        if let Some(name) = tensor.name.strip_suffix(".lora_a") {
            halves.entry(name).or_default().0 = Some(tensor);
        } else if let Some(name) = tensor.name.strip_suffix(".lora_b") {
            halves.entry(name).or_default().1 = Some(tensor);
        } else if !tensor.name.ends_with("_norm.weight") {
            // Norms are ignored, as in llama.cpp.
            return Err(format!("the tensor {:?} is neither lora_a nor lora_b", tensor.name));
        }
    }
    let whole = |(name, halves)| match halves {
        (Some(a), Some(b)) => Ok((name, (a, b))),
        _ => Err(format!("one half of the change of {name:?} is missing")),
    };
    halves.into_iter().map(whole).collect()
}

fn check_pair((a, b): (&Tensor, &Tensor), matrix: &Tensor) -> Result<(), &'static str> {
    if [a, b].iter().any(|half| NOT_MULTIPLIED.contains(&half.kind)) {
        return Err("integers and 64-bit floats cannot be multiplied");
    }
    let is_input = is_input(&matrix.name);
    let (a, b, matrix) = (sides(a), sides(b), sides(matrix));
    // Token embeddings are looked up by row, so their factors are swapped.
    let fits = if is_input {
        matrix[0] == b[1] && matrix[1] == a[1] && a[0] == b[0]
    } else {
        matrix[0] == a[0] && matrix[1] == b[1] && a[1] == b[0]
    };
    if fits && a[2..] == matrix[2..] && b[2..] == matrix[2..] { Ok(()) } else { Err("the shapes do not fit the model") }
}

/// Returns the lengths of all four dimensions. Missing ones are 1.
fn sides(tensor: &Tensor) -> [u64; 4] {
    let mut sides = [1; 4];
    for (side, length) in sides.iter_mut().zip(&tensor.dimensions) {
        *side = *length;
    }
    sides
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::tests::tiny_header;

    fn pirate() -> Header {
        let file = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny-lora-pirate.gguf"));
        Header::parse(&file.expect("the adapter is there")).expect("it is valid")
    }

    /// Returns the error for an adapter after a change.
    fn after(change: impl FnOnce(&mut Header)) -> String {
        let mut adapter = pirate();
        change(&mut adapter);
        check_adapter(&adapter, &tiny_header()).expect_err("it does not fit any more")
    }

    fn set(adapter: &mut Header, key: &str, value: Value) {
        adapter.metadata.insert(key.into(), value);
    }

    #[test]
    fn the_adapter_of_the_tiny_model_belongs_to_it() {
        assert_eq!(check_adapter(&pirate(), &tiny_header()), Ok(()));
    }

    #[test]
    fn a_model_is_no_adapter_and_an_adapter_of_another_architecture_does_not_fit() {
        assert!(check_adapter(&tiny_header(), &tiny_header()).expect_err("a model").contains("not an adapter"));
        let other = after(|adapter| set(adapter, "general.architecture", Value::Text("qwen2".into())));
        assert!(other.contains("\"qwen2\""), "{other}");
        assert!(after(|adapter| set(adapter, "adapter.type", Value::Text("ia3".into()))).contains("type lora"));
    }

    #[test]
    fn an_adapter_without_a_strength_is_refused() {
        assert!(after(|adapter| drop(adapter.metadata.remove("adapter.lora.alpha"))).contains("alpha"));
        assert!(after(|adapter| set(adapter, "adapter.lora.alpha", Value::Float(f64::NAN))).contains("alpha"));
    }

    #[test]
    fn halves_that_are_missing_or_of_other_names_are_refused() {
        assert!(after(|adapter| drop(adapter.tensors.remove(1))).contains("missing"));
        assert!(after(|adapter| adapter.tensors[0].name = "blk.0.attn_q.weight".into()).contains("neither"));
        assert!(after(|adapter| adapter.tensors.clear()).contains("changes nothing"));
        let unknown = after(|adapter| {
            for tensor in &mut adapter.tensors {
                tensor.name = tensor.name.replace("blk.0", "blk.9");
            }
        });
        assert!(unknown.contains("no tensor \"blk.9"), "{unknown}");
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        for side in 0..2 {
            for half in 0..2 {
                let said = after(|adapter| adapter.tensors[half].dimensions[side] += 8);
                assert!(said.contains("shapes") && said.contains("blk.0.attn_q.weight"), "{said}");
            }
        }
        assert!(after(|adapter| adapter.tensors[0].dimensions.push(2)).contains("shapes"));
        assert!(after(|adapter| adapter.tensors[0].kind = 26).contains("integers"));
    }

    #[test]
    fn the_embeddings_of_tokens_are_changed_the_other_way_round_and_only_where_they_are_nothing_else() {
        let half = |name: &str, dimensions: [u64; 2]| Tensor {
            name: name.into(),
            dimensions: dimensions.into(),
            kind: 0,
            offset: 0,
            bytes: 0,
        };
        let mut adapter = pirate();
        adapter.tensors =
            vec![half("token_embd.weight.lora_a", [8, 1_024]), half("token_embd.weight.lora_b", [8, 192])];
        let mut model = tiny_header();
        assert!(check_adapter(&adapter, &model).expect_err("it makes its logits with them").contains("logits"));
        model.tensors.push(half("output.weight", [192, 1_024]));
        assert_eq!(check_adapter(&adapter, &model), Ok(()));
        adapter.tensors[1].dimensions = vec![192, 8];
        assert!(check_adapter(&adapter, &model).is_err());
    }
}
