//! Counts the cells of a KV cache as llama.cpp does inside, without an interface to ask it.

/// Which cells are held, and by how many sequences.
#[derive(Debug)]
pub(super) struct CellLedger {
    holders: Vec<u16>,
    free: Vec<u32>,
}

/// The cells that one sequence holds, one for each of its tokens.
///
/// Only [`CellLedger::release`] gives them back.
#[derive(Debug, Default)]
pub(super) struct Cells(Vec<u32>);

impl CellLedger {
    /// Returns the ledger of an empty cache.
    pub(super) fn new(cells: u32) -> Self {
        Self { holders: vec![0; cells as usize], free: (0..cells).rev().collect() }
    }

    /// Returns how many cells the cache has.
    pub(super) fn len(&self) -> usize {
        self.holders.len()
    }

    /// Returns how many cells nobody holds.
    pub(super) fn free(&self) -> usize {
        self.free.len()
    }

    /// Gives a sequence so many more cells. There must be as many free ones.
    pub(super) fn take(&mut self, cells: &mut Cells, count: usize) {
        let left = self.free.len().checked_sub(count).expect("llama.cpp had cells for these tokens");
        for cell in self.free.drain(left..) {
            self.holders[cell as usize] = 1;
            cells.0.push(cell);
        }
    }

    /// Returns the first cells of a sequence for another one to hold as well.
    pub(super) fn share(&mut self, cells: &Cells, count: usize) -> Cells {
        for cell in &cells.0[..count] {
            self.holders[*cell as usize] += 1;
        }
        Cells(cells.0[..count].to_vec())
    }

    /// Takes the cells of a sequence back, all but its first `keep`.
    pub(super) fn release(&mut self, cells: &mut Cells, keep: usize) {
        for cell in cells.0.drain(keep.min(cells.0.len())..) {
            let holders = &mut self.holders[cell as usize];
            *holders -= 1;
            if *holders == 0 {
                self.free.push(cell);
            }
        }
    }

    /// Returns how many cells would become free if a sequence let go of all of its own.
    pub(super) fn alone(&self, cells: &Cells) -> usize {
        cells.0.iter().filter(|cell| self.holders[**cell as usize] == 1).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn shared_cells_are_free_once_the_last_holder_lets_go() {
        let mut ledger = CellLedger::new(10);
        let mut first = Cells::default();
        ledger.take(&mut first, 6);
        let mut second = ledger.share(&first, 4);
        ledger.take(&mut second, 1);
        assert_eq!((ledger.free(), ledger.alone(&first), ledger.alone(&second)), (3, 2, 1));
        ledger.release(&mut first, 0);
        assert_eq!((ledger.free(), ledger.alone(&second)), (5, 5));
        ledger.release(&mut second, 2);
        assert_eq!(ledger.free(), 8);
    }

    proptest! {
        #[test]
        fn no_cell_is_lost_or_held_twice(steps in prop::collection::vec((0_usize..4, 0_usize..8, 0_usize..40), 0..80)) {
            let mut ledger = CellLedger::new(100);
            let mut sequences: Vec<Cells> = (0..8).map(|_| Cells::default()).collect();
            for (step, index, count) in steps {
                match step {
                    0 => {
                        let count = count.min(ledger.free());
                        ledger.take(&mut sequences[index], count);
                    }
                    1 => ledger.release(&mut sequences[index], count),
                    2 => {
                        let other = (index + 1) % 8;
                        let count = count.min(sequences[index].0.len());
                        let shared = ledger.share(&sequences[index], count);
                        let mut before = std::mem::replace(&mut sequences[other], shared);
                        ledger.release(&mut before, 0);
                    }
                    _ => ledger.release(&mut sequences[index], 0),
                }
                let held: std::collections::HashSet<u32> = sequences.iter().flat_map(|cells| cells.0.clone()).collect();
                prop_assert_eq!(held.len() + ledger.free(), ledger.len());
            }
        }
    }
}
