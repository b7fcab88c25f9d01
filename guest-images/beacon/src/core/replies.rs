//! Numbered datagrams: which were answered, and which are lost.

/// Datagrams that are remembered.
pub const REMEMBERED: usize = 8192;

const WAITING: u8 = 1;
const ANSWERED: u8 = 2;
const LOST: u8 = 3;

/// A datagram.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sent {
    at: u64,
    state: u8,
}

/// What became of the datagrams that were sent, numbered from 0.
pub struct Replies {
    sent: &'static mut [Sent],
    /// Number of the next to be sent.
    next: u64,
    /// All below are answered or lost.
    settled: u64,
    highest: Option<u64>,
    last_reply: Option<u64>,
    /// Datagrams answered, each counted once.
    pub replies: u64,
    /// Not answered in time, nor later so far.
    pub lost: u64,
    /// Answered after they were taken for lost.
    pub late: u64,
    /// Further answers to the same datagram.
    pub duplicates: u64,
    /// Answers that came after one to a datagram sent later.
    pub reordered: u64,
    /// Answers to nothing that is remembered.
    pub strays: u64,
    /// Longest time between two answers, in ticks.
    pub gap: u64,
}

impl Replies {
    /// Nothing sent; a table of [`REMEMBERED`] zeroed entries.
    #[must_use]
    pub fn new(sent: &'static mut [Sent]) -> Self {
        Self {
            sent,
            next: 0,
            settled: 0,
            highest: None,
            last_reply: None,
            replies: 0,
            lost: 0,
            late: 0,
            duplicates: 0,
            reordered: 0,
            strays: 0,
            gap: 0,
        }
    }

    /// Datagrams sent.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.next
    }

    /// Neither answered nor lost yet.
    #[must_use]
    pub fn waiting(&self) -> u64 {
        self.next - self.lost - self.replies
    }

    /// The next number; it is sent now.
    pub fn send(&mut self, now: u64) -> u64 {
        let number = self.next;
        if number - self.settled == REMEMBERED as u64 {
            self.settle_one();
        }
        let place = number as usize % REMEMBERED;
        self.sent[place] = Sent { at: now, state: WAITING };
        self.next += 1;
        number
    }

    /// Takes those for lost that have waited for `timeout`, at most eight for each call.
    pub fn expire(&mut self, now: u64, timeout: u64) {
        for _ in 0..8 {
            let first = self.sent[self.settled as usize % REMEMBERED];
            let old = now.saturating_sub(first.at) > timeout;
            if self.settled == self.next || first.state == WAITING && !old {
                return;
            }
            self.settle_one();
        }
    }

    fn settle_one(&mut self) {
        let first = &mut self.sent[self.settled as usize % REMEMBERED];
        if first.state == WAITING {
            first.state = LOST;
            self.lost += 1;
        }
        self.settled += 1;
    }

    /// An answer.
    pub fn reply(&mut self, number: u64, now: u64) {
        if number >= self.next || self.next - number > REMEMBERED as u64 {
            self.strays += 1;
            return;
        }
        if let Some(last) = self.last_reply.replace(now) {
            self.gap = self.gap.max(now.saturating_sub(last));
        }
        let state = &mut self.sent[number as usize % REMEMBERED].state;
        match core::mem::replace(state, ANSWERED) {
            ANSWERED => {
                self.duplicates += 1;
                return;
            }
            LOST => {
                self.lost -= 1;
                self.late += 1;
            }
            _ => (),
        }
        self.replies += 1;
        match self.highest {
            Some(highest) if number < highest => self.reordered += 1,
            _ => self.highest = Some(number),
        }
    }

    /// Begins a new window for the longest gap.
    pub fn mark(&mut self) {
        self.gap = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn empty() -> Replies {
        Replies::new(vec![Sent::default(); REMEMBERED].leak())
    }

    #[test]
    fn lost_late_twice_and_out_of_order() {
        let mut replies = empty();
        for now in 0..6 {
            assert_eq!(replies.send(now), now);
        }
        replies.reply(0, 10);
        replies.reply(2, 20);
        replies.reply(1, 50);
        replies.reply(2, 51);
        replies.reply(99, 52);
        assert_eq!((replies.replies, replies.reordered, replies.duplicates), (3, 1, 1));
        assert_eq!((replies.strays, replies.gap, replies.waiting()), (1, 30, 3));
        replies.expire(103, 100);
        assert_eq!((replies.lost, replies.waiting()), (0, 3));
        replies.expire(104, 100);
        assert_eq!((replies.lost, replies.waiting()), (1, 2));
        replies.reply(3, 1000);
        assert_eq!((replies.lost, replies.late, replies.gap), (0, 1, 949));
        replies.mark();
        assert_eq!(replies.gap, 0);
        assert_eq!(replies.sent(), replies.replies + replies.lost + replies.waiting());
    }

    #[test]
    fn what_is_forgotten_is_lost() {
        let mut replies = empty();
        for now in 0..REMEMBERED as u64 + 10 {
            replies.send(now);
        }
        assert_eq!(replies.lost, 10);
        replies.reply(9, 0);
        assert_eq!((replies.strays, replies.lost), (1, 10));
        replies.reply(10, 0);
        assert_eq!((replies.replies, replies.lost), (1, 10));
    }
}
