//! The machine of the measurement.

/// Number of threads that can run at the same time.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The CPU's name, and its instructions for matrix products.
pub fn cpu() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = info.lines().find(|line| line.starts_with(name))?;
        line.split_once(':').map(|(_, value)| value.trim().to_owned())
    };
    let flags = field("flags").unwrap_or_default();
    let has = |flag: &&str| flags.split(' ').any(|known| known == *flag);
    let known: Vec<&str> =
        ["avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile"].into_iter().filter(has).collect();
    let name = field("model name").unwrap_or_else(|| std::env::consts::ARCH.into());
    let family = field("cpu family").zip(field("model\t"));
    let family =
        family.map_or_else(String::new, |(family, model)| format!(", family {family} model {model}"));
    format!("{name}{family} ({})", known.join(" "))
}
