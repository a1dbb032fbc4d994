//! Reads the headers of models and adapters from open files. A model may be split into several files.

use std::collections::HashSet;

use tokio::task;

use super::{Header, check_adapter, check_model};
use crate::model_runtime::{EngineError, VerifiedArtifact};

/// Reads a model's header from all of its files. Rejects models on which llama.cpp would abort.
pub async fn read_model(artifact: &VerifiedArtifact) -> Result<Header, EngineError> {
    let checked = |headers| {
        let header = join(headers)?;
        check_model(&header)?;
        Ok(header)
    };
    checked(read_headers(artifact).await?).map_err(|reason| EngineError::InvalidModel { reason })
}

/// Reads an adapter's header. Rejects an adapter that does not fit the model.
pub async fn read_adapter(artifact: &VerifiedArtifact, model: &Header) -> Result<Header, EngineError> {
    let checked = |headers| {
        let header = join(headers)?;
        check_adapter(&header, model)?;
        Ok(header)
    };
    checked(read_headers(artifact).await?).map_err(|reason| EngineError::InvalidModel { reason })
}

async fn read_headers(artifact: &VerifiedArtifact) -> Result<Vec<Header>, EngineError> {
    let failed = |error: &dyn std::error::Error| EngineError::Failed { reason: error.to_string() };
    let files = std::iter::once(artifact).chain(&artifact.parts);
    let files =
        files.map(|part| part.file.try_clone()).collect::<Result<Vec<_>, _>>().map_err(|error| failed(&error))?;
    let read = move || Header::read_all(&files);
    let headers = task::spawn_blocking(read).await.map_err(|error| failed(&error))?;
    headers.map_err(|error| EngineError::InvalidModel { reason: error.to_string() })
}

/// Joins the headers of a model's parts, given in order. Returns an error if they do not form a whole model.
pub fn join(parts: Vec<Header>) -> Result<Header, String> {
    let given = parts.len() as u64;
    let mut parts = parts.into_iter();
    let mut whole = parts.next().ok_or("there is no file")?;
    let count = whole.unsigned("split.count").unwrap_or(0).max(1);
    if count != given {
        return Err(format!("the model is split into {count} files, not {given}"));
    }
    if count == 1 {
        return Ok(whole);
    }
    expect_number(&whole, 0, count)?;
    for (number, part) in (1..).zip(parts) {
        expect_number(&part, number, count)?;
        whole.tensors.extend(part.tensors);
    }
    let mut names = HashSet::new();
    if let Some(twice) = whole.tensors.iter().find(|tensor| !names.insert(tensor.name.as_str())) {
        return Err(format!("the tensor {:?} is in two files", twice.name));
    }
    match whole.unsigned("split.tensors.count") {
        Some(tensors) if tensors == whole.tensors.len() as u64 => Ok(whole),
        _ => Err(format!("the files have {} tensors, which is not what they should have", whole.tensors.len())),
    }
}

fn expect_number(part: &Header, number: u64, count: u64) -> Result<(), String> {
    match (part.unsigned("split.no"), part.unsigned("split.count")) {
        (Some(no), Some(of)) if no == number && of == count => Ok(()),
        (Some(no), Some(of)) => Err(format!("file {} of {count} says that it is {} of {of}", number + 1, no + 1)),
        _ => Err(format!("file {} of {count} does not say which part it is", number + 1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::tests::tiny_header;
    use crate::gguf::{Tensor, Value};

    /// The tiny model, with its tensors dealt out to `count` parts.
    fn parts(count: usize) -> Vec<Header> {
        let whole = tiny_header();
        let dealt =
            |number: usize| -> Vec<Tensor> { whole.tensors.iter().skip(number).step_by(count).cloned().collect() };
        (0..count)
            .map(|number| {
                let mut part = Header { tensors: dealt(number), ..whole.clone() };
                if number > 0 {
                    part.metadata.clear();
                }
                set(&mut part, "split.no", number as u64);
                set(&mut part, "split.count", count as u64);
                set(&mut part, "split.tensors.count", whole.tensors.len() as u64);
                part
            })
            .collect()
    }

    fn set(header: &mut Header, key: &str, number: u64) {
        header.metadata.insert(key.into(), Value::Unsigned(number));
    }

    #[test]
    fn parts_in_their_order_are_the_whole_model() {
        let whole = join(parts(3)).expect("they belong together");
        assert_eq!(whole.tensor_bytes(), tiny_header().tensor_bytes());
        assert_eq!(whole.architecture(), Some("llama"));
        assert_eq!(join(vec![tiny_header()]), Ok(tiny_header()));
    }

    #[test]
    fn parts_that_are_missing_too_many_or_in_another_order_are_refused() {
        let mut missing = parts(3);
        missing.pop();
        assert!(join(missing).expect_err("one is missing").contains("3 files, not 2"));
        assert!(join(vec![parts(2).remove(0)]).expect_err("one is missing").contains("2 files, not 1"));
        assert!(join(vec![tiny_header(), tiny_header()]).expect_err("it is whole").contains("1 files, not 2"));
        let mut swapped = parts(3);
        swapped.swap(1, 2);
        assert!(join(swapped).expect_err("they are swapped").contains("says that it is 3 of 3"));
        assert!(join(Vec::new()).is_err());
    }

    #[test]
    fn parts_of_different_models_are_refused() {
        let mut doubled = parts(2);
        let tensor = doubled[0].tensors[0].clone();
        doubled[1].tensors[0] = tensor;
        assert!(join(doubled).expect_err("it is there twice").contains("in two files"));
        let mut short = parts(2);
        short[1].tensors.pop();
        assert!(join(short).expect_err("one is missing").contains("37 tensors"));
        let mut other = parts(2);
        set(&mut other[1], "split.count", 5);
        assert!(join(other).expect_err("it is of another model").contains("2 of 5"));
    }
}
