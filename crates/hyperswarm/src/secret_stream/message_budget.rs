//! Memory that the messages of unproven peers share: those that are being received, and those that wait for a reader or
//! are still in use.
//!
//! If a message does not fit, the stream that has held such memory for the longest time is destroyed. A peer that sends
//! its message without delay thus gets through while others hold half-sent ones.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Weak};

use bytes::Bytes;
use parking_lot::Mutex;

/// What each stream may hold besides. Shorter messages are not counted.
pub(super) const FREE_BYTES: usize = 4 * 1024;

/// A number of bytes that the messages of many streams share.
pub struct MessageBudget {
    bytes_max: usize,
    holders: Mutex<Holders>,
}

#[derive(Default)]
struct Holders {
    /// By serial number, so that the first one has held memory for the longest time.
    by_age: BTreeMap<u64, Holder>,
    bytes: usize,
    next: u64,
}

struct Holder {
    bytes: usize,
    account: Weak<Account>,
}

/// What one stream holds of a budget.
pub(super) struct Account {
    budget: Arc<MessageBudget>,
    state: Mutex<AccountState>,
    evict: Box<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct AccountState {
    /// This stream's holder, while it holds anything.
    serial: Option<u64>,
    is_evicted: bool,
    is_lifted: bool,
}

/// Bytes that a stream holds. They are given back when this is dropped.
pub(super) struct Held {
    account: Arc<Account>,
    bytes: usize,
}

impl MessageBudget {
    /// Makes a budget of this many bytes. It should exceed the longest message.
    pub fn new(bytes_max: usize) -> Arc<Self> {
        Arc::new(Self { bytes_max, holders: Mutex::default() })
    }
}

impl Holders {
    /// Adds to what a stream holds, if its memory suffices once the oldest others have given way. Those are passed to
    /// `evicted`. Returns whether it was added.
    fn add(&mut self, serial: u64, bytes: usize, bytes_max: usize, evicted: &mut Vec<Weak<Account>>) -> bool {
        // A stream that has just given way to another has no holder any more.
        let Some(own) = self.by_age.get(&serial).map(|holder| holder.bytes) else { return false };
        if own + bytes > bytes_max {
            return false;
        }
        while self.bytes + bytes > bytes_max {
            let Some(oldest) = self.remove_oldest_but(serial) else { return false };
            evicted.push(oldest.account);
        }
        let Some(holder) = self.by_age.get_mut(&serial) else { return false };
        holder.bytes += bytes;
        self.bytes += bytes;
        true
    }

    fn remove_oldest_but(&mut self, serial: u64) -> Option<Holder> {
        let oldest = *self.by_age.keys().find(|oldest| **oldest != serial)?;
        let holder = self.by_age.remove(&oldest)?;
        self.bytes -= holder.bytes;
        Some(holder)
    }

    /// Takes from what a stream holds. Returns whether it holds nothing any more.
    fn remove(&mut self, serial: u64, bytes: usize) -> bool {
        // An evicted stream's memory was given back at once.
        let Some(holder) = self.by_age.get_mut(&serial) else { return false };
        holder.bytes -= bytes;
        self.bytes -= bytes;
        let is_empty = holder.bytes == 0;
        if is_empty {
            self.by_age.remove(&serial);
        }
        is_empty
    }

    fn forget(&mut self, serial: u64) {
        if let Some(holder) = self.by_age.remove(&serial) {
            self.bytes -= holder.bytes;
        }
    }
}

impl Account {
    pub(super) fn new(budget: Arc<MessageBudget>, evict: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { budget, state: Mutex::default(), evict: Box::new(evict) })
    }

    fn add(self: &Arc<Self>, bytes: usize) -> bool {
        let mut evicted = vec![];
        let is_allowed = {
            let mut state = self.state.lock();
            if state.is_evicted || state.is_lifted {
                return state.is_lifted;
            }
            let mut holders = self.budget.holders.lock();
            let serial = *state.serial.get_or_insert_with(|| {
                let serial = holders.next;
                holders.next += 1;
                holders.by_age.insert(serial, Holder { bytes: 0, account: Arc::downgrade(self) });
                serial
            });
            holders.add(serial, bytes, self.budget.bytes_max, &mut evicted)
        };
        for account in evicted.into_iter().filter_map(|account| account.upgrade()) {
            account.state.lock().is_evicted = true;
            (account.evict)();
        }
        is_allowed
    }

    /// Gives back what the stream holds. From here on, nothing is counted, and the stream gives way to no other.
    pub(super) fn lift(&self) {
        let mut state = self.state.lock();
        state.is_lifted = true;
        if let Some(serial) = state.serial.take() {
            self.budget.holders.lock().forget(serial);
        }
    }

    fn remove(&self, bytes: usize) {
        let mut state = self.state.lock();
        if let Some(serial) = state.serial
            && self.budget.holders.lock().remove(serial, bytes)
        {
            state.serial = None;
        }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        // A stream that was refused its first bytes holds none.
        if let Some(serial) = self.state.get_mut().serial {
            self.budget.holders.lock().forget(serial);
        }
    }
}

impl Held {
    pub(super) fn none(account: &Arc<Account>) -> Self {
        Self { account: account.clone(), bytes: 0 }
    }

    /// Sets how many bytes are held. Returns `false` if the budget does not allow that many.
    pub(super) fn set(&mut self, bytes: usize) -> bool {
        if bytes > self.bytes && !self.account.add(bytes - self.bytes) {
            return false;
        }
        if bytes < self.bytes {
            self.account.remove(self.bytes - bytes);
        }
        self.bytes = bytes;
        true
    }

    /// Moves bytes to the message that they belong to. They are held until all clones and parts of it are dropped.
    pub(super) fn give_to(&mut self, message: Bytes) -> Bytes {
        let bytes = message.len().min(self.bytes);
        self.bytes -= bytes;
        let held = Self { account: self.account.clone(), bytes };
        Bytes::from_owner(Counted { message, _held: held })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.account.remove(self.bytes);
        }
    }
}

/// A message and the memory that it holds.
struct Counted {
    message: Bytes,
    _held: Held,
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.message
    }
}

impl fmt::Debug for MessageBudget {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("MessageBudget").field("bytes_max", &self.bytes_max).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn account(budget: &Arc<MessageBudget>) -> (Arc<Account>, Arc<AtomicUsize>) {
        let evictions = Arc::new(AtomicUsize::new(0));
        let counter = evictions.clone();
        let evict = move || {
            counter.fetch_add(1, Ordering::Relaxed);
        };
        (Account::new(budget.clone(), evict), evictions)
    }

    #[test]
    fn the_stream_that_has_held_memory_for_the_longest_time_gives_way() {
        let budget = MessageBudget::new(100);
        let [(one, _), (two, two_evicted), (three, three_evicted)] = [(); 3].map(|()| account(&budget));
        let (mut of_one, mut of_two, mut of_three) = (Held::none(&one), Held::none(&two), Held::none(&three));
        assert!(of_one.set(40) && of_two.set(40));
        assert!(of_one.set(0) && of_one.set(30), "from here on, the second has held memory for longer");
        assert!(of_three.set(50));
        assert_eq!([&two_evicted, &three_evicted].map(|count| count.load(Ordering::Relaxed)), [1, 0]);
        assert!(!of_two.set(50), "a stream that gave way gets nothing more");
        drop(of_two);
        assert_eq!(budget.holders.lock().bytes, 80);
        assert!(!of_three.set(101), "more than the whole budget");
        drop((of_one, of_three, one, two, three));
        let holders = budget.holders.lock();
        assert_eq!((holders.bytes, holders.by_age.len()), (0, 0));
    }

    #[test]
    fn a_stream_whose_limits_were_lifted_gives_way_to_no_other() {
        let budget = MessageBudget::new(100);
        let [(one, one_evicted), (two, _)] = [(); 2].map(|()| account(&budget));
        let (mut of_one, mut of_two) = (Held::none(&one), Held::none(&two));
        assert!(of_one.set(80));
        let message = of_one.give_to(Bytes::from(vec![1; 50]));
        one.lift();
        assert!(of_two.set(100) && of_one.set(200));
        drop((message, of_one));
        assert_eq!((one_evicted.load(Ordering::Relaxed), budget.holders.lock().bytes), (0, 100));
    }

    #[test]
    fn a_message_holds_its_memory_until_its_last_part_is_dropped() {
        let budget = MessageBudget::new(100);
        let (account, _) = account(&budget);
        let mut held = Held::none(&account);
        assert!(held.set(60));
        let message = held.give_to(Bytes::from(vec![1; 50]));
        let part = message.slice(10..20);
        drop(message);
        assert!(held.set(0));
        assert_eq!(budget.holders.lock().bytes, 50);
        drop(part);
        assert_eq!(budget.holders.lock().bytes, 0);
    }
    #[test]
    fn a_stream_that_gives_way_while_it_asks_for_more_is_charged_nothing() {
        let budget = MessageBudget::new(100);
        let (account, _) = account(&budget);
        let mut held = Held::none(&account);
        assert!(held.set(10));
        let serial = account.state.lock().serial.expect("it holds something");
        std::thread::scope(|scope| {
            let mut holders = budget.holders.lock();
            let asks = scope.spawn(move || held.set(50));
            // It locks its own state first, and then waits for the holders.
            while !account.state.is_locked() {
                std::thread::yield_now();
            }
            holders.forget(serial);
            drop(holders);
            assert!(!asks.join().expect("a thread"), "its memory was taken meanwhile");
        });
        let holders = budget.holders.lock();
        assert_eq!((holders.bytes, holders.by_age.len()), (0, 0));
    }

    #[test]
    fn nothing_is_left_of_many_streams_that_make_each_other_give_way() {
        const BYTES_MAX: usize = 10_000;
        let budget = MessageBudget::new(BYTES_MAX);
        let hold_and_evict = |seed: u64| {
            let mut random = seed;
            let mut below = |limit: usize| {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (random >> 33) as usize % limit
            };
            let mut streams: Vec<_> = std::iter::repeat_with(|| None).take(64).collect();
            for _ in 0..20_000 {
                let stream = &mut streams[below(64)];
                let (account, evictions, held) = stream.get_or_insert_with(|| {
                    let (account, evictions) = account(&budget);
                    let held = Held::none(&account);
                    (account, evictions, held)
                });
                // A long message takes the memory of many.
                let bytes = if below(16) == 0 { below(BYTES_MAX) } else { below(64) };
                let is_refused = !held.set(bytes);
                let (evictions, is_evicted) = (evictions.load(Ordering::Relaxed), account.state.lock().is_evicted);
                assert!(evictions <= usize::from(is_evicted), "a stream gives way once");
                if is_refused {
                    *stream = None;
                }
            }
        };
        std::thread::scope(|scope| {
            for seed in 0..8 {
                scope.spawn(move || hold_and_evict(seed));
            }
        });
        let holders = budget.holders.lock();
        assert_eq!((holders.bytes, holders.by_age.len()), (0, 0));
    }

    #[test]
    fn a_stream_whose_memory_was_taken_gets_no_more_and_is_charged_nothing() {
        let mut holders = Holders { bytes: 100, next: 2, ..Holders::default() };
        holders.by_age.insert(1, Holder { bytes: 100, account: Weak::new() });
        let mut evicted = vec![];
        assert!(!holders.add(0, 60, 100, &mut evicted), "its serial is gone");
        assert_eq!((holders.bytes, evicted.len()), (100, 0), "nobody gives way to it");
    }
}
