//! Resource packs of the account, one of each type. A pack has units and slots of its own.

/// Type of a resource pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PackType {
    Video,
    Image,
}

/// Resource pack, with the slots and units that are in use.
#[derive(Debug)]
pub(super) struct Pack {
    /// Name with the units and slots, in the form that was measured by `aself101/kling-api` (2026):
    /// `Trial-Video-100Units-5Con-1Months`.
    pub(super) name: String,
    pub(super) id: &'static str,
    /// Most slots that running tasks may hold. Above that, a create gets 1303.
    pub(super) slots: u32,
    pub(super) held: u32,
    /// Units that ended tasks have cost, including forgotten tasks.
    pub(super) spent: u32,
}

/// All packs of the account.
#[derive(Debug)]
pub(super) struct Packs {
    pub(super) video: Pack,
    pub(super) image: Pack,
}

/// Units in each pack. No test uses so many, because nobody could buy another pack.
const UNITS: u32 = 1_000_000;

// === impl PackType ===

impl PackType {
    /// Returns the name in `billing` (Kling's page "Query Task").
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Video => "video",
            Self::Image => "image",
        }
    }
}

// === impl Pack ===

impl Pack {
    fn new(title: &str, id: &'static str, slots: u32) -> Self {
        Self {
            name: format!("Trial-{title}-{UNITS}Units-{slots}Con-12Months"),
            id,
            slots,
            held: 0,
            spent: 0,
        }
    }

    /// Returns true if `count` more slots are free. A task that needs no slot always fits.
    pub(super) fn has_room(&self, count: u32) -> bool {
        count == 0 || self.held.saturating_add(count) <= self.slots
    }
}

// === impl Packs ===

impl Packs {
    /// Creates the packs with `slots` slots each.
    pub(super) fn new(slots: u32) -> Self {
        Self {
            video: Pack::new("Video", "00000000000000000000000000000001", slots),
            image: Pack::new("Image", "00000000000000000000000000000002", slots),
        }
    }

    pub(super) fn of(&self, pack_type: PackType) -> &Pack {
        match pack_type {
            PackType::Video => &self.video,
            PackType::Image => &self.image,
        }
    }

    pub(super) fn of_mut(&mut self, pack_type: PackType) -> &mut Pack {
        match pack_type {
            PackType::Video => &mut self.video,
            PackType::Image => &mut self.image,
        }
    }
}

/// Returns the units that are left after `spent` units, as a decimal like on the wire.
pub(super) fn units(spent: u32) -> f64 {
    f64::from(UNITS.saturating_sub(spent))
}
