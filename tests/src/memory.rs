//! The memory of a process, as the kernel counts it.

fn status(pid: u32, name: &str) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process lives");
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).expect("a line of the status");
    line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") * 1024
}

/// What it has in memory now, in bytes.
///
/// # Panics
/// When there is no such process.
#[must_use]
pub fn resident(pid: u32) -> usize {
    status(pid, "VmRSS")
}

/// The most it has had in memory since [`forget_peak`], in bytes.
///
/// # Panics
/// When there is no such process.
#[must_use]
pub fn peak(pid: u32) -> usize {
    status(pid, "VmHWM")
}

/// Lets the peak begin at what it has now.
///
/// # Panics
/// When there is no such process, or it belongs to another user.
pub fn forget_peak(pid: u32) {
    std::fs::write(format!("/proc/{pid}/clear_refs"), "5").expect("a process of ours");
}

/// What waits in the kernel on our side of the connections to a port of this machine, to be sent or to be read, in bytes.
///
/// # Panics
/// Where the kernel does not tell.
#[must_use]
pub fn queued(port: u16) -> usize {
    let table = std::fs::read_to_string("/proc/net/tcp").expect("the kernel's table of connections");
    let local = format!(":{port:04X}");
    let queues = table.lines().filter_map(|line| {
        let mut columns = line.split_whitespace().skip(1);
        let ours = columns.next()?.ends_with(&local);
        let (send, receive) = columns.nth(2)?.split_once(':')?;
        let bytes = |hex: &str| usize::from_str_radix(hex, 16).ok();
        ours.then_some(bytes(send)? + bytes(receive)?)
    });
    queues.sum()
}
