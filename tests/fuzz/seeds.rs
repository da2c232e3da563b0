//! Where the fuzzer begins: inputs made by Ferry's own encoders, so that they follow every change of a format.

use ferry::backup::id::BackupId;
use ferry::backup::incremental::{Change, Header, Writer};
use ferry::block::dirty_bitmap::{BitmapRun, DirtyBitmaps, Granularity};
use ferry::block::nbd::protocol::{self as nbd_protocol, IHAVEOPT, Request};
use ferry::block::sidecar::{Contents, ImageStamp, StoredBitmap};
use ferry::device::serial::SerialPort;
use ferry::device::virtio::blk::VirtioBlk;
use ferry::device::virtio::mmio::VirtioMmio;
use ferry::device::{Device, DeviceState};
use ferry::memory::{GuestRam, HostPage, PageRun};
use ferry::migrate::compression::Compressor;
use ferry::migrate::driver::owner::MachineSetup;
use ferry::migrate::report::Faults;
use ferry::migrate::source::Source;
use ferry::migrate::wire::{
    BitmapFlags, BitmapInfo, BitmapPlace, Channel, Compressed, Frame, Holding, Method, Package, Setup, Totals, VERSION,
};
use ferry::vm::config::{DiskConfig, GuestConfig};
use ferry::vm::facts::MachineFacts;
use kvm_bindings::*;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::entry::virtio_blk::{AVAIL, DESC, QUEUE, USED, disk};

/// The seeds of the target with this name.
pub fn seeds(target: &str) -> Vec<Vec<u8>> {
    match target {
        "boot" => vec![elf(None), elf(Some(0x10_0000)), bzimage()],
        "command_line" => command_lines(),
        "destination" => vec![destination(true), destination(false), recovery_of_destination()],
        "incremental" => vec![incremental()],
        "machine_state" => vec![machine_state(), setup()],
        "nbd" => vec![nbd(true), nbd(false)],
        "nbd_client" => vec![nbd_server()],
        "qmp" => qmp(),
        "serial" => vec![serial()],
        "sidecar" => vec![sidecar()],
        "source" => (0..3).map(source).chain([recovery_of_source()]).collect(),
        "virtio_blk" => [0, 1, 8, 11, 13].map(|kind| virtio_blk(kind).to_vec()).to_vec(),
        "virtio_mmio" => vec![virtio_mmio(0), virtio_mmio(1)],
        "wire" => [from_source(true), from_destination(true), vec![holding()], compressed()].concat().iter().map(bytes).collect(),
        _ => Vec::new(),
    }
}

fn bytes(frame: &Frame) -> Vec<u8> {
    frame.encode().expect("a frame")
}

fn bitmap(name: &str) -> BitmapInfo {
    BitmapInfo {
        disk: "root".into(),
        name: name.into(),
        granularity: 65536,
        bits: 128,
        flags: BitmapFlags { enabled: true, persistent: true },
    }
}

/// All that a source says on its main connection, except for the pages in postcopy.
fn from_source(postcopy: bool) -> Vec<Frame> {
    let (host_page, huge) = (HostPage::SMALL, vec![PageRun::new(512, 512)]);
    let disks = if postcopy { vec![0, 40] } else { Vec::new() };
    let setup = Setup { ram_pages: 1024, host_page, huge, postcopy, page_channels: 1, machine: vec![1, 2, 3], disks };
    // The second disk's blocks, of which four are missing, begin at page 1536.
    let missing = if postcopy { vec![PageRun::new(2, 1), PageRun::new(40, 8), PageRun::new(1540, 4)] } else { Vec::new() };
    let sent = Totals { normal: 4, zero: 3 };
    let bitmaps = vec![bitmap("a"), bitmap("b")];
    let mut frames = vec![
        Source::hello(7, 0, Channel::Main),
        Frame::Setup(setup),
        Frame::Pages(PageRun::new(0, 4)),
        Frame::Zero(vec![PageRun::new(1, 1), PageRun::new(10, 2)]),
        Frame::PassEnd(sent),
        Frame::Switchover(Package { sent, postcopy, missing, bitmaps, machine: vec![4, 5, 6] }),
        Frame::Commit,
        Frame::Bitmap { index: 0, first: 0, run: BitmapRun::Words(vec![1, 2]) },
        Frame::BitmapComplete(0),
        Frame::Bitmap { index: 1, first: 0, run: BitmapRun::Ones(2) },
        Frame::BitmapComplete(1),
    ];
    if postcopy {
        frames.extend([Frame::Pages(PageRun::new(2, 1)), Frame::Zero(vec![PageRun::new(40, 8)]), Frame::Zero(vec![PageRun::new(1540, 4)])]);
    }
    frames.extend([Frame::End, Frame::Goodbye]);
    frames
}

/// All that a destination says on its main connection.
fn from_destination(postcopy: bool) -> Vec<Frame> {
    let faults = Faults { requested: u64::from(postcopy), ..Faults::default() };
    vec![
        Frame::Welcome { version: VERSION, program: "ferry".into() },
        Frame::Prepared,
        Frame::PassAck,
        Frame::Ready { load_us: 5, warnings: vec!["hm".into()] },
        Frame::Running(3),
        Frame::Request(PageRun::new(100, 1)),
        Frame::Request(PageRun::new(1030, 40)),
        Frame::Done { faults: Box::new(faults), warnings: Vec::new(), block_waits: Some(Box::default()) },
        Frame::Abort("no".into()),
    ]
}

/// What is said on the connection for pages rather than on the main one.
fn is_on_pages(frame: &Frame) -> bool {
    matches!(frame, Frame::Pages(_) | Frame::Compressed(_) | Frame::Zero(_))
}

/// The connections that follow the main one.
fn others() -> Vec<u8> {
    let mut steps = vec![0x80];
    steps.extend(bytes(&Source::hello(7, 0, Channel::Urgent)));
    steps.push(0x85);
    steps.extend(bytes(&Source::hello(7, 0, Channel::Pages(0))));
    steps
}

fn destination(postcopy: bool) -> Vec<u8> {
    let mut steps = Vec::new();
    for (index, frame) in from_source(postcopy).iter().enumerate() {
        if is_on_pages(frame) {
            steps.push(0x85);
        }
        steps.extend(bytes(frame));
        if index == 0 {
            steps.extend(others());
        }
        if *frame == Frame::Commit {
            steps.extend([0x83, 40, 0x83, 50]);
        }
    }
    steps
}

fn source(mode: u8) -> Vec<u8> {
    let mut steps = vec![mode, 0x84, 4];
    // In mode postcopy there is no pass.
    for frame in from_destination(true).into_iter().filter(|frame| mode < 2 || *frame != Frame::PassAck) {
        if frame.kind() == ferry::migrate::wire::Kind::Request {
            steps.push(0x80);
        }
        steps.extend(bytes(&frame));
        steps.extend([0x82, 1, 0x84, 100]);
    }
    steps
}

/// What a destination has that knows nothing of the commit.
fn holding() -> Frame {
    Frame::Holding(Holding { committed: false, missing: vec![PageRun::new(2, 1)], bitmaps: BitmapPlace { index: 1, words: 1 } })
}

fn compressed() -> Vec<Frame> {
    let contents: Vec<u8> = (0..4096).map(|index| (index % 7) as u8).collect();
    let frame = |method| {
        let contents = Compressor::new(method).and_then(|mut compressor| compressor.compress(&contents).map(<[u8]>::to_vec));
        Frame::Compressed(Compressed { run: PageRun::new(3, 1), method, contents: contents.expect("memory") })
    };
    vec![frame(Method::Lz4), frame(Method::Zstd)]
}

/// The link breaks behind the first bitmap, and another one carries the rest.
fn recovery_of_destination() -> Vec<u8> {
    let frames = from_source(true);
    let rest = frames.iter().position(|frame| *frame == Frame::BitmapComplete(0)).map_or(0, |place| place + 1);
    let mut steps = Vec::new();
    for (index, frame) in frames.iter().enumerate() {
        if index == rest {
            steps.extend([0x81, 0]);
            steps.extend(bytes(&frames[0]));
        }
        if is_on_pages(frame) {
            steps.push(0x85);
        }
        steps.extend(bytes(frame));
        if index == 0 || index == rest {
            steps.extend(others());
        }
    }
    steps
}

/// The link breaks behind the commit, and a person joins the two again.
fn recovery_of_source() -> Vec<u8> {
    let mut steps = vec![2, 0x84, 4];
    let [welcome, prepared, ready, running, done] = [0, 1, 3, 4, 7].map(|index| from_destination(true)[index].clone());
    for frame in [&welcome, &prepared, &Frame::PassAck, &ready] {
        steps.extend(bytes(frame));
        steps.extend([0x84, 100]);
    }
    steps.extend([0x81, 0, 0x84, 2, 0x83, 3, 0x84, 2]);
    for frame in [&welcome, &holding(), &running, &done] {
        steps.extend(bytes(frame));
        steps.extend([0x84, 100]);
    }
    steps
}

/// Without its checksum, which the target adds.
fn sidecar() -> Vec<u8> {
    let bitmaps = DirtyBitmaps::new(4 << 20);
    bitmaps.restore(&StoredBitmap::listed("lost", 65536)).expect("a bitmap");
    let add = |name, bytes| bitmaps.change(|held| held.add(name, Granularity::new(bytes)?, true, true));
    add("coarse", 65536).and_then(|()| add("fine", 512)).expect("bitmaps");
    bitmaps.mark(5 << 16, 1 << 16);
    let mut bytes = Vec::new();
    let image = ImageStamp { size: 4 << 20, seconds: 1_700_000_000, nanoseconds: 5 };
    Contents { image, bitmaps: bitmaps.stored() }.encode_to(&mut bytes).expect("memory");
    bytes.truncate(bytes.len() - 32);
    bytes
}

/// Without its checksum, which the target adds.
fn incremental() -> Vec<u8> {
    let (id, parents) = (BackupId([1; 16]), vec![BackupId([2; 16]), BackupId([3; 16])]);
    let header = Header { id, parents, disk: "root".into(), size: 4 << 20, granularity: 65536 };
    let mut writer = Writer::new(Vec::new(), &header).expect("memory");
    for (offset, change) in [(0, Change::Zeros(65536)), (65536, Change::Data(&[7; 512])), (1 << 20, Change::Zeros(3 << 20))] {
        writer.change(offset, change).expect("memory");
    }
    let mut bytes = writer.finish().expect("memory");
    bytes.truncate(bytes.len() - 32);
    bytes
}

/// A handshake, the status of all of it, and a read.
fn nbd_server() -> Vec<u8> {
    use nbd_protocol::{NBDMAGIC, chunk, chunk_head, info, option, option_reply};
    let reply = nbd_protocol::option_reply;
    let context =
        |id: u32, name: &str| reply(option::SET_META_CONTEXT, option_reply::META_CONTEXT, &[&id.to_be_bytes(), name.as_bytes()].concat());
    let export = [&info::EXPORT.to_be_bytes()[..], &65536u64.to_be_bytes(), &[0, 3]].concat();
    let chunk = |flags, kind, cookie, payload: &[u8]| [&chunk_head(flags, kind, cookie, payload.len() as u32)[..], payload].concat();
    let numbers = |numbers: &[u32]| numbers.iter().flat_map(|number| number.to_be_bytes()).collect::<Vec<u8>>();
    [
        [&NBDMAGIC.to_be_bytes()[..], &IHAVEOPT.to_be_bytes(), &[0, 3]].concat(),
        reply(option::STRUCTURED_REPLY, option_reply::ACK, &[]),
        context(5, "base:allocation"),
        context(6, "qemu:dirty-bitmap:b"),
        reply(option::SET_META_CONTEXT, option_reply::ACK, &[]),
        reply(option::GO, option_reply::INFO, &export),
        reply(option::GO, option_reply::ACK, &[]),
        chunk(0, chunk::BLOCK_STATUS, 1, &numbers(&[5, 4096, 0, 61440, 3])),
        chunk(0, chunk::BLOCK_STATUS, 1, &numbers(&[6, 8192, 1, 57344, 0])),
        chunk(chunk::DONE, chunk::NONE, 1, &[]),
        chunk(0, chunk::OFFSET_DATA, 2, &[&0u64.to_be_bytes()[..], &[7; 512]].concat()),
        chunk(chunk::DONE, chunk::OFFSET_HOLE, 2, &[&512u64.to_be_bytes()[..], &numbers(&[3584])].concat()),
    ]
    .concat()
}

/// Every option and every request of an NBD client.
fn nbd(structured: bool) -> Vec<u8> {
    use nbd_protocol::{command, command_flag, option, string};
    let say =
        |option: u32, data: &[u8]| [&IHAVEOPT.to_be_bytes()[..], &option.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat();
    let name = if structured { "r" } else { "w" };
    let info = [&string(name)[..], &2u16.to_be_bytes(), &[0, 1, 0, 2]].concat();
    let queries = [&string(name)[..], &2u32.to_be_bytes(), &string("base:allocation"), &string("qemu:dirty-bitmap:b")].concat();
    let mut input = 3u32.to_be_bytes().to_vec();
    input.extend(say(option::LIST, &[]));
    input.extend(say(option::INFO, &info));
    if structured {
        input.extend(say(option::STRUCTURED_REPLY, &[]));
        input.extend(say(option::LIST_META_CONTEXT, &queries));
        input.extend(say(option::SET_META_CONTEXT, &queries));
    }
    input.extend(if structured { say(option::GO, &info) } else { say(option::EXPORT_NAME, name.as_bytes()) });
    let commands = [
        (command::READ, command_flag::DF),
        (command::READ, 0),
        (command::BLOCK_STATUS, command_flag::REQ_ONE),
        (command::BLOCK_STATUS, 0),
        (command::WRITE, command_flag::FUA),
        (command::TRIM, 0),
        (command::WRITE_ZEROES, command_flag::NO_HOLE),
        (command::FLUSH, 0),
        (command::DISC, 0),
    ];
    for (command, flags) in commands {
        input.extend(Request { flags, command, cookie: 7, offset: 512, length: 1024 }.encode());
        if command == command::WRITE {
            input.extend([9; 1024]);
        }
    }
    input
}

fn qmp() -> Vec<Vec<u8>> {
    let commands = [
        r#"{"execute": "qmp_capabilities", "arguments": {"enable": []}, "id": 1}"#,
        r#"{"execute": "migrate", "arguments": {"uri": "tcp:127.0.0.1:4444", "detach": true}}"#,
        r#"{"execute": "migrate-set-parameters", "arguments": {"downtime-limit": 50, "max-bandwidth": 125000000}}"#,
        r#"{"execute": "migrate-set-capabilities", "arguments": {"capabilities": [{"capability": "postcopy-ram", "state": true}]}}"#,
        r#"{"execute": "block-dirty-bitmap-add", "arguments": {"node": "root", "name": "backup", "granularity": 65536}}"#,
        r#"{"execute": "transaction", "arguments": {"actions": [{"type": "abort", "data": {}}]}}"#,
        r#"{"execute": "block-dirty-bitmap-merge", "arguments": {"node": "root", "target": "a", "bitmaps": ["b", {"node": "d", "name": "c"}]}}"#,
        r#"{"execute": "nbd-server-start", "arguments": {"addr": {"type": "inet", "data": {"host": "::", "port": "10809"}}, "max-connections": 3}}"#,
        r#"{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "e", "node-name": "root", "bitmaps": ["b", {"node": "root", "name": "c"}]}}"#,
        "garbage\n{\"execute\": \"query-status\"}",
    ];
    commands.map(Vec::from).to_vec()
}

fn command_lines() -> Vec<Vec<u8>> {
    let lines = [
        "run\n--kernel\nvmlinuz\n--memory\n512M\n--cpus\n2\n--disk\npath=a,,b,id=root,readonly=on\n--serial\nunix:s\n--qmp\nq",
        "receive\n--listen\ntcp:[::1]:4444\n--disk\nid=root,path=/dev/vg/root",
        "migrate\n--qmp\nq\nunix:/run/in\n--mode\nprecopy\n--downtime\n50ms\n--max-bandwidth\n1Gbit\n--postcopy-bandwidth\n125M",
        "backup\n--qmp\nq\nroot\n--bitmap\nb\n--to\nf\n--full\n--force\n--listen\nunix:s",
        "backup\nrestore\n--to\ni\nfull\n1\n2",
        "export\n--qmp\nq\nroot\n--listen\ntcp:[::1]:10809\n--name\nn\n--writable\n--bitmap\nb0\n--bitmap\nb1\n--detach",
    ];
    lines.map(Vec::from).to_vec()
}

fn setup() -> Vec<u8> {
    let disks = vec![DiskConfig { id: "root".into(), path: "disk.img".into(), readonly: false, options: Default::default() }];
    let config = GuestConfig {
        name: "guest".into(),
        cpus: 2,
        memory: 512 << 20,
        lock_memory: false,
        hugepages: false,
        kernel: "vmlinuz".into(),
        initrd: Some("initrd".into()),
        cmdline: "quiet".into(),
        disks,
    };
    let facts = MachineFacts { cpuid: Vec::new(), cpus: 2, tsc_khz: 1_000_000, msrs: vec![0x10, 0x11], xsave_size: 4096 };
    postcard::to_stdvec(&MachineSetup { config, facts, disk_sizes: vec![65536] }).expect("a setup")
}

/// An ELF file of one segment, with a PVH note if there is an entry for it.
fn elf(pvh: Option<u32>) -> Vec<u8> {
    const EHDR: u64 = 64;
    const PHDR: u64 = 56;
    let note =
        pvh.map(|entry| [&4u32.to_le_bytes()[..], &4u32.to_le_bytes(), &18u32.to_le_bytes(), b"Xen\0", &entry.to_le_bytes()].concat());
    let headers = 1 + u16::from(note.is_some());
    let content = EHDR + 2 * PHDR;
    let program = |kind: u32, offset: u64, address: u64, size: u64| {
        let flags = 7u32;
        let numbers = [offset, address, address, size, size, 0];
        [&kind.to_le_bytes()[..], &flags.to_le_bytes()].concat().into_iter().chain(numbers.into_iter().flat_map(u64::to_le_bytes))
    };
    let mut file = vec![1, 0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    file.extend([2u16, 62].into_iter().flat_map(u16::to_le_bytes));
    file.extend(1u32.to_le_bytes());
    file.extend([0x10_0000, EHDR, 0].into_iter().flat_map(u64::to_le_bytes));
    file.extend(0u32.to_le_bytes());
    file.extend([EHDR as u16, PHDR as u16, headers, 0, 0, 0].into_iter().flat_map(u16::to_le_bytes));
    file.extend(program(1, content, 0x10_0000, 4));
    file.extend(program(4, content + 4, 0, note.as_ref().map_or(0, |note| note.len() as u64)));
    file.extend([0xf4; 4]);
    file.extend(note.unwrap_or_default());
    file
}

/// A bzImage of one setup sector and 1 KiB of kernel.
fn bzimage() -> Vec<u8> {
    let mut file = vec![0; 0x800];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1f4, &64u32.to_le_bytes());
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
    put(0x202, b"HdrS");
    put(0x206, &0x20fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x214, &0x10_0000u32.to_le_bytes());
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x236, &1u16.to_le_bytes());
    put(0x238, &255u32.to_le_bytes());
    put(0x258, &0x10_0000u64.to_le_bytes());
    put(0x260, &0x1000u32.to_le_bytes());
    file.insert(0, 3);
    file
}

fn serial() -> Vec<u8> {
    let port = SerialPort::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
    port.input(&[b'x'; 70]);
    let state = port.save().expect("a state").state;
    [&[state.len() as u8][..], &state, &[1, 0xff, 2, 1, 3, 0x80, 0, 12, 3, 3, 4, 0x1f, 0, b'a']].concat()
}

/// One request of a kind: descriptor table, rings, and what the descriptors point to.
fn virtio_blk(kind: u32) -> [u8; 0x260] {
    let mut input = [0; 0x260];
    let mut put = |at: u64, bytes: &[u8]| input[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    let header = 0x180;
    let writes = u16::from(matches!(kind, 0 | 8)) * 2;
    let pieces =
        [(header, 16u32, 1u16, 1u16), (header + 0x20, if writes == 0 { 16 } else { 512 }, 1 | writes, 2), (header + 0x60, 1, 2, 0)];
    for (index, (address, length, flags, next)) in (0u64..).zip(pieces) {
        put(4 + index * 16, &(DESC + address).to_le_bytes());
        put(12 + index * 16, &length.to_le_bytes());
        put(16 + index * 16, &flags.to_le_bytes());
        put(18 + index * 16, &next.to_le_bytes());
    }
    put(4 + AVAIL - DESC + 2, &1u16.to_le_bytes());
    put(4 + header, &kind.to_le_bytes());
    put(4 + header + 8, &1u64.to_le_bytes());
    put(4 + header + 0x28, &8u32.to_le_bytes());
    put(0, &[2, 0, 0, 0]);
    input
}

fn virtio_mmio(choice: u8) -> Vec<u8> {
    let mut input = Vec::new();
    if choice == 1 {
        let device = VirtioMmio::new(GuestRam::allocate(2 << 20).expect("RAM"), VirtioBlk::new(disk(), |_| {})).expect("a device");
        let DeviceState { state, .. } = device.save().expect("a state");
        input.push(state.len() as u8);
        input.extend(state);
    } else {
        input.push(0);
    }
    let write = |register: u8, value: u32| [&[register / 4][..], &value.to_le_bytes()].concat();
    let memory = virtio_blk(1);
    for (index, part) in memory[4..].chunks(0x7f).enumerate() {
        let address = DESC as u16 + index as u16 * 0x7f;
        input.push(0x80 + part.len() as u8);
        input.extend(address.to_le_bytes());
        input.extend(part);
    }
    for status in [0, 1, 3] {
        input.extend(write(0x70, status));
    }
    for (register, value) in [(0x24, 1), (0x20, 1), (0x70, 11), (0x30, 0), (0x38, QUEUE.into()), (0x80, DESC as u32), (0x90, AVAIL as u32)]
    {
        input.extend(write(register, value));
    }
    for (register, value) in [(0xa0, USED as u32), (0x44, 1), (0x70, 15), (0x50, 0), (0x64, 1), (0x50, 0)] {
        input.extend(write(register, value));
    }
    input
}

/// A machine with one vCPU and one device, all zeros: only the lengths have to be right.
fn machine_state() -> Vec<u8> {
    fn abi<T>() -> Vec<u8> {
        vec![0; size_of::<T>()]
    }
    let cpuid = vec![abi::<kvm_cpuid_entry2>()];
    let registers = (abi::<kvm_mp_state>(), abi::<kvm_regs>(), abi::<kvm_sregs>(), vec![0u8; 576], abi::<kvm_xcrs>());
    let more = (abi::<kvm_debugregs>(), abi::<kvm_lapic_state>(), 1_000_000u32, Some(7u64), cpuid.clone(), vec![(0x10u32, 5u64)]);
    let vcpus = vec![(registers, more, abi::<kvm_vcpu_events>())];
    let chips = (abi::<kvm_irqchip>(), abi::<kvm_irqchip>(), abi::<kvm_irqchip>(), abi::<kvm_pit_state2>());
    let devices = vec![DeviceState { id: "serial".into(), version: 1, state: vec![1, 2, 3] }];
    let state = (cpuid, vcpus, chips, (abi::<kvm_clock_data>(), 9u64), devices);
    let bytes = postcard::to_extend(&state, b"FRYM\x01\x00".to_vec()).expect("a state");
    assert!(ferry::vm::state::MachineState::from_bytes(&bytes).is_ok(), "the seed follows the structure");
    bytes
}
