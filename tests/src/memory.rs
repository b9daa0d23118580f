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

/// What the kernel holds for TCP on this machine, in bytes.
///
/// # Panics
/// Where the kernel does not tell.
#[must_use]
pub fn of_tcp() -> usize {
    let counts = std::fs::read_to_string("/proc/net/sockstat").expect("the kernel's counts");
    let tcp = counts.lines().find(|line| line.starts_with("TCP:")).expect("a line for TCP");
    let pages = tcp.split_whitespace().skip_while(|word| *word != "mem").nth(1).expect("its memory");
    pages.parse::<usize>().expect("a number of pages") * 4096
}
