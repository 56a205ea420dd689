//! The mount options, as manuals and messages have them.

/// An option of boxlitefs itself, as manuals and messages have it. (What every mount takes is not here.)
#[derive(Clone, Copy, Debug)]
pub struct DocumentedOption {
    /// As it is written, such as `cache=SIZE`.
    pub form: &'static str,
    /// What it does, in a message without a full stop.
    pub effect: &'static str,
}

/// The options that are for people to know.
pub const DOCUMENTED_OPTIONS: &[DocumentedOption] = &[
    DocumentedOption {
        form: "ro",
        effect: "every change says EROFS, and nothing at all is written into the home",
    },
    DocumentedOption {
        form: "allow_other",
        effect: "other users may enter; the modes of the files, which follow those of the home, decide",
    },
    DocumentedOption {
        form: "allow_root",
        effect: "root may enter",
    },
    DocumentedOption {
        form: "shared",
        effect: "snapshots, clones, imports and restores are made also while a BoxLite program has the home open, of boxes that do not run",
    },
    DocumentedOption {
        form: "noexec",
        effect: "programs in guests' files can't be run from there",
    },
    DocumentedOption {
        form: "noatime",
        effect: "access times are not kept",
    },
    DocumentedOption {
        form: "compress=LEVEL",
        effect: "zstd's level for export.boxlite.zst, 1 (fast) to 19 (small); 3 unless said",
    },
    DocumentedOption {
        form: "cache=SIZE",
        effect: "most disk space in the home for finished export.boxlite.zst, as 512M or 8G; 4G unless said, 0 for none",
    },
    DocumentedOption {
        form: "compact=SECONDS",
        effect: "how long nothing has to go on until the mount merges layers that nothing needs by themselves; 30 unless said, or off",
    },
    DocumentedOption {
        form: "max_import=SIZE",
        effect: "most disk space that one import may take, as 512M or 8G; no limit unless said",
    },
    DocumentedOption {
        form: "import=untrusted",
        effect: "archives whose options reach into the host (volumes, ports for everyone, weaker isolation) are refused; import=trusted unless said",
    },
    DocumentedOption {
        form: "links=guest",
        effect: "symbolic links in rootfs say what the guest said, to archive a tree as it is; they may lead to files of the host. links=inside unless said: they lead to the guest's own files",
    },
];
