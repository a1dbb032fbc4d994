//! Merges an adapter into the weights of its model, in a copy of the model's file.
//!
//! An adapter that is kept separate adds work to each token. An adapter that every job uses anyway costs nothing once
//! it is merged. The change it makes is small, so weights of few bits would be rounded back to what they were.
//! [`Merge::Refused`] reports that case, and the adapter stays separate.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use half::{bf16, f16};
use tokio::task;
use tokio_util::sync::CancellationToken;

use crate::gguf::{self, Header, Tensor};
use crate::model_runtime::{EngineError, VerifiedArtifact};

/// Bytes that are copied or changed at a time.
const STEP_BYTES: usize = 1 << 20;
/// Numbers that share a scale in `Q8_0`.
const BLOCK: usize = 32;
const BLOCK_BYTES: usize = 2 + BLOCK;

/// The result of a merge.
#[derive(Debug)]
pub enum Merge {
    /// The model with the adapter's changes merged into its weights.
    Done(VerifiedArtifact),
    /// The adapter cannot be merged and stays separate, for this reason.
    Refused(String),
}

/// Number formats that are precise enough for small changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    F32,
    F16,
    BF16,
    Q8_0,
}

/// Merges an adapter into a copy of a model, which is written to the empty file `scratch`. Returns
/// [`EngineError::InvalidModel`] if the adapter does not fit the model. Dropping the future stops the merge.
pub async fn merge(model: &VerifiedArtifact, adapter: &VerifiedArtifact, scratch: File) -> Result<Merge, EngineError> {
    if !model.parts.is_empty() {
        return Ok(Merge::Refused("the model is cut in several files".into()));
    }
    let header = gguf::read_model(model).await?;
    let adapter_header = gguf::read_adapter(adapter, &header).await?;
    if let Some(obstacle) = obstacle(&header, &adapter_header) {
        return Ok(Merge::Refused(obstacle));
    }
    let failed = |error: &dyn std::error::Error| EngineError::Failed { reason: format!("merging: {error}") };
    let files = model.file.try_clone().and_then(|model| Ok((model, adapter.file.try_clone()?)));
    let (model_file, adapter_file) = files.map_err(|error| failed(&error))?;
    let bytes = model.bytes;
    // Dropping the future stops the blocking task.
    let stop = CancellationToken::new();
    let (stopped, _waits) = (stop.clone(), stop.drop_guard());
    let written = task::spawn_blocking(move || {
        if !reserve(&scratch, bytes) {
            return Ok(None);
        }
        copy(&model_file, &scratch, bytes, &stopped)?;
        change(&scratch, &header, &adapter_file, &adapter_header, &stopped)?;
        Ok::<_, io::Error>(Some(scratch))
    });
    let written = written.await.map_err(|error| failed(&error))?.map_err(|error| failed(&error))?;
    Ok(match written {
        Some(file) => Merge::Done(VerifiedArtifact { file, sha256: model.sha256.clone(), bytes, parts: Vec::new() }),
        None => Merge::Refused("the disk has no room for a changed copy of the model".into()),
    })
}

/// Returns why an adapter that fits a model cannot be merged into it.
fn obstacle(model: &Header, adapter: &Header) -> Option<String> {
    let pairs = match gguf::adapter_pairs(adapter) {
        Ok(pairs) => pairs,
        Err(problem) => return Some(problem),
    };
    pairs.iter().find_map(|(name, (a, b))| {
        let matrix = matrix(model, name);
        let forms = [Some(*a), Some(*b), matrix].map(|tensor| tensor.and_then(|tensor| Form::of(tensor.kind)));
        if gguf::is_input(name) {
            Some("it changes the embeddings of tokens".into())
        } else if matrix.is_some_and(|matrix| !is_matrix(matrix)) {
            Some(format!("{name:?} is no matrix"))
        } else if self::matrix(model, &name.replace(".weight", ".scale")).is_some() {
            Some(format!("{name:?} has a scale of its own, which is not for changes"))
        } else if forms[2].is_none() {
            Some(format!("the numbers of {name:?} have too few bits for small changes"))
        } else if forms.contains(&None) {
            Some(format!("the change of {name:?} is itself quantised"))
        } else {
            None
        }
    })
}

fn matrix<'a>(model: &'a Header, name: &str) -> Option<&'a Tensor> {
    model.tensors.iter().find(|tensor| tensor.name == name)
}

fn is_matrix(tensor: &Tensor) -> bool {
    tensor.dimensions.len() >= 2 && tensor.dimensions[2..].iter().all(|side| *side == 1)
}

/// Reserves disk space for the copy. Returns false if the disk is too full: a partial copy would take space that
/// others need.
fn reserve(file: &File, bytes: u64) -> bool {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{FallocateFlags, fallocate};
        use rustix::io::Errno;

        // Some file systems do not support it. There, the copy itself finds out.
        !matches!(fallocate(file, FallocateFlags::empty(), 0, bytes), Err(Errno::NOSPC | Errno::DQUOT | Errno::FBIG))
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (file, bytes);
        true
    }
}

fn copy(from: &File, to: &File, bytes: u64, stop: &CancellationToken) -> io::Result<()> {
    let mut buffer = vec![0; STEP_BYTES];
    let mut offset = 0;
    while offset < bytes {
        go_on(stop)?;
        let step = buffer.len().min(usize::try_from(bytes - offset).unwrap_or(usize::MAX));
        from.read_exact_at(&mut buffer[..step], offset)?;
        to.write_all_at(&buffer[..step], offset)?;
        offset += step as u64;
    }
    Ok(())
}

fn go_on(stop: &CancellationToken) -> io::Result<()> {
    if stop.is_cancelled() { Err(io::ErrorKind::Interrupted.into()) } else { Ok(()) }
}

/// Adds the changes of an adapter to the matrices in a model's file.
fn change(
    file: &File,
    model: &Header,
    adapter_file: &File,
    adapter: &Header,
    stop: &CancellationToken,
) -> io::Result<()> {
    let invalid = |problem: &str| io::Error::new(io::ErrorKind::InvalidData, problem.to_owned());
    let alpha = gguf::adapter_alpha(adapter).ok_or_else(|| invalid("the adapter does not say how strong it is"))?;
    for (name, (a, b)) in gguf::adapter_pairs(adapter).map_err(|problem| invalid(&problem))? {
        go_on(stop)?;
        let matrix = matrix(model, name).ok_or_else(|| invalid("the model lacks a matrix"))?;
        let form = Form::of(matrix.kind).ok_or_else(|| invalid("a matrix has another form"))?;
        let rank = a.dimensions.get(1).copied().unwrap_or(1).max(1);
        // As in llama.cpp, an alpha of 0 means the plain product.
        let scale = if alpha == 0.0 { 1.0 } else { (alpha / rank as f64) as f32 };
        let halves = (read(adapter_file, adapter, a)?, read(adapter_file, adapter, b)?);
        let change = Change { halves, scale, rank: rank as usize };
        change.apply(file, model.data_offset + matrix.offset, matrix, form)?;
    }
    Ok(())
}

/// The change of one matrix: `scale · b · a`.
struct Change {
    halves: (Vec<f32>, Vec<f32>),
    scale: f32,
    rank: usize,
}

impl Change {
    fn apply(&self, file: &File, mut offset: u64, matrix: &Tensor, form: Form) -> io::Result<()> {
        let columns = matrix.dimensions.first().map_or(1, |columns| *columns as usize).max(1);
        let row_bytes = form.bytes(columns).max(1);
        let mut bytes = vec![0; row_bytes * (STEP_BYTES / row_bytes).max(1)];
        let mut numbers = vec![0.0; columns];
        let mut rows = self.halves.1.chunks_exact(self.rank).peekable();
        while rows.peek().is_some() {
            let rows: Vec<&[f32]> = rows.by_ref().take(bytes.len() / row_bytes).collect();
            let bytes = &mut bytes[..rows.len() * row_bytes];
            file.read_exact_at(bytes, offset)?;
            for (row, bytes) in rows.iter().zip(bytes.chunks_exact_mut(row_bytes)) {
                form.read(bytes, &mut numbers);
                for (factor, direction) in row.iter().zip(self.halves.0.chunks_exact(columns)) {
                    let factor = factor * self.scale;
                    numbers.iter_mut().zip(direction).for_each(|(number, step)| *number += factor * step);
                }
                form.write(&numbers, bytes);
            }
            file.write_all_at(bytes, offset)?;
            offset += bytes.len() as u64;
        }
        Ok(())
    }
}

/// Reads all numbers of one factor of a change.
fn read(file: &File, adapter: &Header, half: &Tensor) -> io::Result<Vec<f32>> {
    let form = Form::of(half.kind).ok_or_else(|| io::Error::other("a half has another form"))?;
    let mut bytes = vec![0; half.bytes as usize];
    file.read_exact_at(&mut bytes, adapter.data_offset + half.offset)?;
    let count = half.dimensions.iter().product::<u64>() as usize;
    let mut numbers = vec![0.0; count];
    form.read(&bytes, &mut numbers);
    Ok(numbers)
}

impl Form {
    /// Returns the format for ggml's type number.
    fn of(kind: u32) -> Option<Self> {
        match kind {
            0 => Some(Self::F32),
            1 => Some(Self::F16),
            8 => Some(Self::Q8_0),
            30 => Some(Self::BF16),
            _ => None,
        }
    }

    fn bytes(self, numbers: usize) -> usize {
        match self {
            Self::F32 => numbers * 4,
            Self::F16 | Self::BF16 => numbers * 2,
            Self::Q8_0 => numbers / BLOCK * BLOCK_BYTES,
        }
    }

    fn read(self, bytes: &[u8], numbers: &mut [f32]) {
        let pairs = |read: fn([u8; 2]) -> f32, numbers: &mut [f32]| {
            let (pairs, _) = bytes.as_chunks();
            numbers.iter_mut().zip(pairs).for_each(|(number, pair)| *number = read(*pair));
        };
        match self {
            Self::F32 => {
                let (fours, _) = bytes.as_chunks();
                numbers.iter_mut().zip(fours).for_each(|(number, four)| *number = f32::from_le_bytes(*four));
            }
            Self::F16 => pairs(|pair| f16::from_le_bytes(pair).to_f32(), numbers),
            Self::BF16 => pairs(|pair| bf16::from_le_bytes(pair).to_f32(), numbers),
            Self::Q8_0 => {
                for (numbers, block) in numbers.chunks_exact_mut(BLOCK).zip(bytes.chunks_exact(BLOCK_BYTES)) {
                    let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
                    let steps = block[2..].iter().map(|byte| f32::from(byte.cast_signed()));
                    numbers.iter_mut().zip(steps).for_each(|(number, steps)| *number = steps * scale);
                }
            }
        }
    }

    fn write(self, numbers: &[f32], bytes: &mut [u8]) {
        let pairs = |write: fn(f32) -> [u8; 2], bytes: &mut [u8]| {
            let (pairs, _) = bytes.as_chunks_mut();
            pairs.iter_mut().zip(numbers).for_each(|(pair, number)| *pair = write(*number));
        };
        match self {
            Self::F32 => {
                let (fours, _) = bytes.as_chunks_mut();
                fours.iter_mut().zip(numbers).for_each(|(four, number)| *four = number.to_le_bytes());
            }
            Self::F16 => pairs(|number| f16::from_f32(number).to_le_bytes(), bytes),
            Self::BF16 => pairs(|number| bf16::from_f32(number).to_le_bytes(), bytes),
            Self::Q8_0 => {
                for (numbers, block) in numbers.chunks_exact(BLOCK).zip(bytes.chunks_exact_mut(BLOCK_BYTES)) {
                    let largest = numbers.iter().fold(0.0, |largest: f32, number| largest.max(number.abs()));
                    let scale = largest / 127.0;
                    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                    block[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
                    let steps = numbers.iter().map(|number| (number * inverse).round() as i8);
                    block[2..].iter_mut().zip(steps).for_each(|(byte, steps)| *byte = steps.cast_unsigned());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again_as_closely_as_its_form_allows() {
        let numbers: Vec<f32> = (0..64).map(|number| (number as f32 - 20.0) * 0.37).collect();
        let largest = 43.0 * 0.37;
        for (form, most) in [
            (Form::F32, 0.0),
            (Form::F16, largest / 2048.0),
            (Form::BF16, largest / 256.0),
            (Form::Q8_0, largest / 250.0),
        ] {
            let mut bytes = vec![0; form.bytes(numbers.len())];
            form.write(&numbers, &mut bytes);
            let mut again = vec![0.0; numbers.len()];
            form.read(&bytes, &mut again);
            for (number, again) in numbers.iter().zip(&again) {
                assert!((number - again).abs() <= most, "{form:?}: {again} for {number}");
            }
        }
    }

    #[test]
    fn a_change_is_the_product_of_its_halves() {
        let file = tempfile::tempfile().expect("temporary files work");
        // Three rows of four numbers, after a byte that does not belong to them.
        let before: Vec<u8> = (0..12_u8).flat_map(|number| f32::from(number).to_le_bytes()).collect();
        file.write_all_at(&[[7].as_slice(), &before].concat(), 0).expect("it is written");
        let matrix = Tensor { name: "m".into(), dimensions: vec![4, 3], kind: 0, offset: 1, bytes: 48 };
        let a = vec![1.0, 0.0, 0.0, 2.0, 0.0, 1.0, 0.0, 0.0];
        let b = vec![1.0, 0.0, 0.0, 3.0, 0.0, 0.0];
        Change { halves: (a, b), scale: 0.5, rank: 2 }.apply(&file, 1, &matrix, Form::F32).expect("it is changed");
        let mut after = vec![0; 49];
        file.read_exact_at(&mut after, 0).expect("it is as long as before");
        let mut numbers = vec![0.0; 12];
        Form::F32.read(&after[1..], &mut numbers);
        assert_eq!(after[0], 7);
        assert_eq!(numbers, [0.5, 1.0, 2.0, 4.0, 4.0, 6.5, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]);
    }
}
