//! Our matrix kernels, which ggml calls through `native/matrices.cpp`.

use std::ops::Range;
use std::ptr::{self, NonNull};
use std::slice;

use kernels::{Attention, LANES, Matrix, Quantization};
use llama_cpp_sys_2 as sys;
use rustix::mm::{Advice, madvise};

use crate::own_process;

/// The number of bytes packed before their source pages are released.
const PART_BYTES: usize = 4 << 20;

/// The functions passed to C++, in the order of `tether_matrix_functions`.
#[repr(C)]
struct Functions {
    can_pack: unsafe extern "C" fn(u32, usize, usize) -> bool,
    pack: unsafe extern "C" fn(u32, usize, usize, *const u8, *mut u8),
    inputs_bytes: unsafe extern "C" fn(u32, usize, usize, usize) -> usize,
    take_in: unsafe extern "C" fn(u32, usize, usize, *const f32, usize, usize, usize, usize, *mut u8),
    multiply: unsafe extern "C" fn(u32, usize, usize, *const u8, *const u8, usize, usize, usize, *mut f32),
    attention_floats: unsafe extern "C" fn(*const Attention) -> usize,
    attention_units: unsafe extern "C" fn(*const Attention, usize) -> usize,
    attend: unsafe extern "C" fn(*const Attention, usize, usize, *mut f32),
}

/// The state that `watch.cpp` keeps for a context.
#[repr(C)]
struct RawWatch {
    _private: [u8; 0],
}

unsafe extern "C" {
    fn tether_register_matrices(functions: *const Functions) -> bool;
    fn tether_forget_amx() -> usize;
    fn tether_watch(context: *const sys::llama_context, with_kernels: bool) -> *mut RawWatch;
    fn tether_unwatch(watch: *mut RawWatch);
    fn tether_evaluate(watch: *const RawWatch);
    fn tether_pack(packs: bool);
}

/// Where the cells of a context are, and whether our kernels evaluate it.
#[derive(Debug)]
pub(super) struct Watch(NonNull<RawWatch>);

impl Watch {
    /// # Safety
    /// The context must be valid, and outlive the result.
    pub(super) unsafe fn new(context: *const sys::llama_context, with_kernels: bool) -> Self {
        // SAFETY: the caller guarantees that the context is valid.
        let watch = unsafe { tether_watch(context, with_kernels) };
        Self(NonNull::new(watch).expect("C++ allocates or throws"))
    }

    /// Runs `evaluate` and tells ggml, on this thread, that it evaluates this context.
    pub(super) fn during<T>(&self, evaluate: impl FnOnce() -> T) -> T {
        // SAFETY: the watch lives for the call and is released before the call ends.
        unsafe { tether_evaluate(self.0.as_ptr()) };
        let result = evaluate();
        // SAFETY: as above.
        unsafe { tether_evaluate(ptr::null()) };
        result
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // SAFETY: the handle owns the watch, and no thread evaluates the context.
        unsafe { tether_unwatch(self.0.as_ptr()) }
    }
}

/// Loads a model with or without packing its matrices for our kernels.
pub(super) fn load_with<T>(kernels: bool, load: impl FnOnce() -> T) -> T {
    // SAFETY: the call sets a thread-local variable.
    unsafe { tether_pack(kernels) };
    let result = load();
    // SAFETY: as above.
    unsafe { tether_pack(true) };
    result
}

/// Registers our kernels with ggml if the processor supports them. Must be called before the first model is loaded.
pub(super) fn register() -> bool {
    let functions =
        Functions { can_pack, pack, inputs_bytes, take_in, multiply, attention_floats, attention_units, attend };
    // SAFETY: called once, before any model is loaded.
    unsafe { tether_forget_amx() };
    // SAFETY: the functions are copied. Called once, before any model is loaded.
    kernels::is_supported() && unsafe { tether_register_matrices(&raw const functions) }
}

fn matrix(kind: u32, columns: usize, rows: usize) -> Option<Matrix> {
    Matrix::new(Quantization::of_ggml(kind)?, columns, rows)
}

/// A matrix for which `can_pack` returned true.
fn packed(kind: u32, columns: usize, rows: usize) -> Matrix {
    matrix(kind, columns, rows).expect("only what can be packed is packed")
}

extern "C" fn can_pack(kind: u32, columns: usize, rows: usize) -> bool {
    matrix(kind, columns, rows).is_some()
}

/// Packs a matrix and releases the source's file pages part by part, so that the model is in memory only once.
unsafe extern "C" fn pack(kind: u32, columns: usize, rows: usize, source: *const u8, to: *mut u8) {
    let whole = packed(kind, columns, rows);
    let is_file = is_of_file(source.addr());
    let groups = (PART_BYTES / whole.group_bytes()).max(1);
    for first in (0..whole.groups()).step_by(groups) {
        let part = packed(kind, columns, LANES * groups.min(whole.groups() - first));
        let begin = first * whole.group_bytes();
        // SAFETY: ggml guarantees both buffers and asserts their size. A released file page is read again if it is
        // needed again.
        unsafe {
            let source = source.add(begin);
            let bytes = slice::from_raw_parts(source, part.bytes());
            part.pack(bytes, slice::from_raw_parts_mut(to.add(begin), part.bytes()));
            let pages = whole_pages(source.addr()..source.addr() + part.bytes());
            if is_file && !pages.is_empty() {
                let _ = madvise(source.cast_mut().with_addr(pages.start).cast(), pages.len(), Advice::LinuxDontNeed);
            }
        }
    }
}

/// Returns whether an address belongs to a file mapping.
fn is_of_file(address: usize) -> bool {
    let maps = own_process::mappings().unwrap_or_default();
    maps.lines().any(|line| {
        let mut fields = line.split_ascii_whitespace();
        let range = fields.next().and_then(|range| range.split_once('-'));
        let Some((from, to)) = range else { return false };
        let number = |text| usize::from_str_radix(text, 16).unwrap_or(0);
        // The fifth field is the inode, which is 0 for mappings without a file.
        (number(from)..number(to)).contains(&address) && fields.nth(3).is_some_and(|inode| inode != "0")
    })
}

/// Returns the pages that lie entirely within a range.
fn whole_pages(range: Range<usize>) -> Range<usize> {
    let page = rustix::param::page_size();
    range.start.next_multiple_of(page)..range.end / page * page
}

extern "C" fn inputs_bytes(kind: u32, columns: usize, rows: usize, count: usize) -> usize {
    packed(kind, columns, rows).inputs_bytes(count)
}

unsafe extern "C" fn take_in(
    kind: u32,
    columns: usize,
    rows: usize,
    vector: *const f32,
    from: usize,
    to: usize,
    index: usize,
    count: usize,
    inputs: *mut u8,
) {
    // SAFETY: the vector has one number per column of the matrix. ggml allocated the `inputs_bytes` bytes, and no two
    // threads are given the same blocks.
    unsafe {
        let vector = slice::from_raw_parts(vector, columns);
        packed(kind, columns, rows).take_in(vector, from..to, index, count, inputs);
    }
}

unsafe extern "C" fn multiply(
    kind: u32,
    columns: usize,
    rows: usize,
    matrix: *const u8,
    inputs: *const u8,
    count: usize,
    from: usize,
    to: usize,
    outputs: *mut f32,
) {
    // SAFETY: `pack` wrote the matrix, and `take_in` all inputs. No two threads are given the same groups.
    unsafe { packed(kind, columns, rows).multiply(matrix, inputs, count, from..to, outputs) };
}

unsafe extern "C" fn attention_floats(attention: *const Attention) -> usize {
    // SAFETY: C++ lends it for the call, here and below.
    let attention = unsafe { &*attention };
    if attention.is_possible() { attention.scratch_floats() } else { 0 }
}

unsafe extern "C" fn attention_units(attention: *const Attention, threads: usize) -> usize {
    // SAFETY: as above.
    unsafe { (*attention).units(threads) }
}

unsafe extern "C" fn attend(attention: *const Attention, unit: usize, threads: usize, scratch: *mut f32) {
    // SAFETY: as above. ggml describes the tensors correctly, and every thread has its own scratch and units.
    unsafe { (*attention).attend(unit, threads, scratch) };
}
