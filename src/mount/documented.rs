//! The mount options as help, manuals and messages describe them.

/// A mount option of boxlitefs itself. (Options that every mount takes are not documented here.)
#[derive(Clone, Copy, Debug)]
pub struct DocumentedOption {
    /// Its form, such as `cache=SIZE`.
    pub form: &'static str,
    /// What it does, a sentence without a full stop.
    pub effect: &'static str,
}

/// All options of boxlitefs.
pub const DOCUMENTED_OPTIONS: &[DocumentedOption] = &[
    DocumentedOption {
        form: "ro",
        effect: "every change fails with EROFS, and nothing at all is written into the home",
    },
    DocumentedOption {
        form: "allow_other",
        effect: "other users may enter; the modes of the files, which follow those of the home, decide what they may read",
    },
    DocumentedOption {
        form: "allow_root",
        effect: "root may enter",
    },
    DocumentedOption {
        form: "exclusive",
        effect: "every change waits until no BoxLite program has the home open; without it, those that are safe beside one are made",
    },
    DocumentedOption {
        form: "noexec",
        effect: "programs in guests' files can't be run from the mount",
    },
    DocumentedOption {
        form: "noatime",
        effect: "access times are not kept",
    },
    DocumentedOption {
        form: "compress=LEVEL",
        effect: "zstd's level for export.boxlite.zst, from 1 (fast) to 19 (small); default 3",
    },
    DocumentedOption {
        form: "cache=SIZE",
        effect: "largest disk space in the home for finished export.boxlite.zst, such as 512M or 8G; default 4G, 0 for none",
    },
    DocumentedOption {
        form: "compact=SECONDS",
        effect: "idle seconds before the mount merges redundant layers in the background; default 30, or off",
    },
    DocumentedOption {
        form: "undo=TIME",
        effect: "how long what is removed or restored over can be had back from .boxlite/undo, such as 30m, 24h or 7d; default 24h, or off",
    },
    DocumentedOption {
        form: "max_import=SIZE",
        effect: "largest disk space that one import may take, such as 512M or 8G; default no limit",
    },
    DocumentedOption {
        form: "import=untrusted",
        effect: "archives whose options reach into the host (volumes, ports for everyone, weaker isolation) are refused; default import=trusted",
    },
    DocumentedOption {
        form: "links=guest",
        effect: "symbolic links in rootfs have the targets that the guest gave them, to archive a tree as it is; they may lead to files of the host. With the default links=inside they lead to the guest's own files",
    },
];
