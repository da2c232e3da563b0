//! Bitmaps of two disks against sets of pieces: every operation, alone and in transactions that fail at some point.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use proptest::prelude::*;

use super::*;
use crate::block::sidecar::{Contents, ImageStamp};

const GRANULARITIES: [u64; 4] = [512, 4096, 65536, 1 << 20];
const NAMES: [&str; 3] = ["a", "b", "c"];
const DISKS: usize = 2;

#[derive(Clone, Debug)]
enum Operation {
    Add {
        name: usize,
        granularity: usize,
        enabled: bool,
    },
    Remove(usize),
    Clear(usize),
    Enable(usize, bool),
    /// Into the first, from these of any disk.
    Merge(usize, Vec<(usize, usize)>),
}

#[derive(Clone, Debug)]
enum Step {
    Mark {
        disk: usize,
        offset: u64,
        length: u64,
    },
    Transaction {
        actions: Vec<(usize, Operation)>,
        abort: bool,
    },
    /// The first disk's bitmaps are stored and taken back.
    Store,
}

#[derive(Clone, Debug, PartialEq)]
struct ModelBitmap {
    granularity: u64,
    enabled: bool,
    pieces: BTreeSet<u64>,
}

type Model = [BTreeMap<&'static str, ModelBitmap>; DISKS];

fn operation() -> impl Strategy<Value = Operation> {
    let name = || 0..NAMES.len();
    prop_oneof![
        4 => (name(), 0..GRANULARITIES.len(), any::<bool>()).prop_map(|(name, granularity, enabled)| Operation::Add { name, granularity, enabled }),
        1 => name().prop_map(Operation::Remove),
        1 => name().prop_map(Operation::Clear),
        2 => (name(), any::<bool>()).prop_map(|(name, enabled)| Operation::Enable(name, enabled)),
        3 => (name(), prop::collection::vec((0..DISKS, name()), 0..3)).prop_map(|(target, sources)| Operation::Merge(target, sources)),
    ]
}

fn step(size: u64) -> impl Strategy<Value = Step> {
    let actions = prop::collection::vec((0..DISKS, operation()), 1..4);
    prop_oneof![
        5 => (0..DISKS, 0..size + 1000, 0..size / 4).prop_map(|(disk, offset, length)| Step::Mark { disk, offset, length }),
        5 => (actions, prop::bool::weighted(0.2)).prop_map(|(actions, abort)| Step::Transaction { actions, abort }),
        1 => Just(Step::Store),
    ]
}

fn touched(range: Range<u64>, granularity: u64) -> Range<u64> {
    range.start / granularity..range.end.div_ceil(granularity)
}

/// None where the bitmaps must refuse.
fn model_act(model: &mut Model, disk: usize, operation: &Operation, size: u64) -> Option<()> {
    match operation {
        Operation::Add { name, granularity, enabled } => {
            let bitmap = ModelBitmap { granularity: GRANULARITIES[*granularity], enabled: *enabled, pieces: BTreeSet::new() };
            let name = NAMES[*name];
            (!model[disk].contains_key(name)).then(|| model[disk].insert(name, bitmap)).map(drop)
        }
        Operation::Remove(name) => model[disk].remove(NAMES[*name]).map(drop),
        Operation::Clear(name) => model[disk].get_mut(NAMES[*name]).map(|bitmap| bitmap.pieces.clear()),
        Operation::Enable(name, enabled) => model[disk].get_mut(NAMES[*name]).map(|bitmap| bitmap.enabled = *enabled),
        Operation::Merge(target, sources) => {
            let sources: Option<Vec<ModelBitmap>> = sources.iter().map(|(disk, name)| model[*disk].get(NAMES[*name]).cloned()).collect();
            let target = model[disk].get_mut(NAMES[*target])?;
            for source in sources? {
                for piece in source.pieces {
                    let bytes = piece * source.granularity..((piece + 1) * source.granularity).min(size);
                    target.pieces.extend(touched(bytes, target.granularity));
                }
            }
            Some(())
        }
    }
}

fn act(held: &mut [HeldBitmaps<'_>], disk: usize, operation: &Operation) -> Result<(), BitmapError> {
    match operation {
        Operation::Add { name, granularity, enabled } => {
            held[disk].add(NAMES[*name], Granularity::new(GRANULARITIES[*granularity]).unwrap(), *enabled, true)
        }
        Operation::Remove(name) => held[disk].remove(NAMES[*name]),
        Operation::Clear(name) => held[disk].clear(NAMES[*name]),
        Operation::Enable(name, enabled) => held[disk].set_enabled(NAMES[*name], *enabled),
        Operation::Merge(target, sources) => {
            let sources: Result<Vec<_>, _> = sources.iter().map(|(disk, name)| held[*disk].source(NAMES[*name])).collect();
            held[disk].merge(NAMES[*target], &sources?)
        }
    }
}

/// Through the bytes of a sidecar.
fn restored(bitmaps: &DirtyBitmaps, size: u64) -> Arc<DirtyBitmaps> {
    let mut bytes = Vec::new();
    let image = ImageStamp { size, seconds: 1, nanoseconds: 2 };
    Contents { image, bitmaps: bitmaps.stored() }.encode_to(&mut bytes).unwrap();
    let restored = DirtyBitmaps::new(size);
    Contents::decode(&bytes).unwrap().bitmaps.iter().for_each(|bitmap| restored.restore(bitmap).unwrap());
    restored
}

fn compare(bitmaps: &DirtyBitmaps, model: &BTreeMap<&'static str, ModelBitmap>, size: u64) -> Result<(), TestCaseError> {
    let info = bitmaps.info();
    prop_assert_eq!(info.len(), model.len());
    for bitmap in info {
        let expected = &model[bitmap.name.as_str()];
        let granularity = expected.granularity;
        prop_assert_eq!((bitmap.granularity.bytes(), bitmap.recording), (granularity, expected.enabled));
        prop_assert!(bitmap.persistent && !bitmap.inconsistent && !bitmap.busy);
        let ranges = bitmaps.dirty_ranges(&bitmap.name).unwrap();
        let pieces: BTreeSet<u64> = ranges.into_iter().flat_map(|range| touched(range, granularity)).collect();
        prop_assert_eq!(&pieces, &expected.pieces);
        let count: u64 = pieces.iter().map(|piece| ((piece + 1) * granularity).min(size) - piece * granularity).sum();
        prop_assert_eq!(bitmap.count, count);
    }
    Ok(())
}

proptest! {
    #[test]
    fn bitmaps_behave_like_sets_of_pieces(size in 1u64..5_000_000, steps in prop::collection::vec(step(5_000_000), 0..40)) {
        let mut disks = [(); DISKS].map(|()| DirtyBitmaps::new(size));
        let mut model = Model::default();
        for step in steps {
            match step {
                Step::Mark { disk, offset, length } => {
                    disks[disk].mark(offset, length);
                    let end = (offset + length).min(size);
                    for bitmap in model[disk].values_mut().filter(|bitmap| bitmap.enabled && offset < end) {
                        bitmap.pieces.extend(touched(offset..end, bitmap.granularity));
                    }
                }
                Step::Transaction { actions, abort } => {
                    let mut changed = model.clone();
                    let expected = actions.iter().try_for_each(|(disk, operation)| model_act(&mut changed, *disk, operation, size));
                    let mut held: Vec<_> = disks.iter().map(|disk| disk.hold()).collect();
                    let done = actions.iter().try_for_each(|(disk, operation)| act(&mut held, *disk, operation));
                    prop_assert_eq!(done.is_ok(), expected.is_some(), "{:?}", done);
                    if done.is_ok() && !abort {
                        held.into_iter().for_each(HeldBitmaps::commit);
                        model = changed;
                    }
                }
                Step::Store => disks[0] = restored(&disks[0], size),
            }
            for (bitmaps, model) in disks.iter().zip(&model) {
                compare(bitmaps, model, size)?;
            }
        }
    }
}
