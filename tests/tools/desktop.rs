//! A user with a mouse in a file manager, played by tests/desktop/drag.sh.

use std::fs;
use std::path::Path;

use crate::common::*;
use serde_json::Value;

#[test]
fn boxes_are_looked_at_dragged_in_and_out_copied_and_deleted_in_a_file_manager() {
    let home = TestHome::new();
    home.wheel_batch(&[
        &["snapshot-create", "web", "clean"],
        &["import", text(&archive()), "worker"],
        &["snapshot-create", "worker", "old"],
    ]);
    home.guest_write("web", FREE_AREA, b"since that snapshot");
    let (live, snapshot) = (
        digest(&home.live_disk("web")),
        digest(&home.snapshot_disk("web", "clean")),
    );
    let mount = home.mount();
    let folder = home.beside("folder");
    fs::create_dir(&folder).unwrap();
    fs::copy(archive(), folder.join("api.boxlite")).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/desktop/drag.sh");
    succeed(&[text(&script), text(mount.root()), text(&folder)]);

    let looked: Value = serde_json::from_slice(&fs::read(folder.join(".looked")).unwrap()).unwrap();
    assert_eq!(
        looked["cache"]["archives"], 0,
        "looking compressed an archive: {looked}"
    );
    let shown = |path: &str| fs::read(mount.at(path)).unwrap();
    let copied = |path: &str| fs::read(folder.join(path)).unwrap();
    for path in ["web/export.boxlite", "web/snapshots/clean/export.boxlite"] {
        assert!(copied(path) == shown(path), "{path}");
    }
    for path in ["web/box.json", "web/snapshots/clean/snapshot.json"] {
        // What is shared has changed: the copy in the mount shares it.
        let but_space = |bytes: &[u8]| -> Value {
            let mut json: Value = serde_json::from_slice(bytes).unwrap();
            json.as_object_mut().unwrap().remove("space");
            json
        };
        assert_eq!(but_space(&copied(path)), but_space(&shown(path)), "{path}");
    }
    assert!(copied("export.boxlite") == shown("web/export.boxlite"));
    assert!(copied("export.boxlite.zst") == shown("web/export.boxlite.zst"));
    // The file manager chooses the name of the second copy.
    let mut names = mount.names(".");
    names.retain(|name| !name.starts_with('.'));
    let second = names.iter().find(|name| name.starts_with("web ("));
    let second = second.expect("a copy of web").clone();
    assert_eq!(names, ["api", "web", &second], "{}", mount.log());
    drop(mount);
    assert_eq!(digest(&home.live_disk("api")), archive_digest(&archive()));
    for name in ["web", &second] {
        assert_eq!(digest(&home.live_disk(name)), live, "{name}");
        assert_eq!(digest(&home.snapshot_disk(name, "clean")), snapshot);
    }
    for (archive, name) in [("export.boxlite", "plain"), ("export.boxlite.zst", "small")] {
        home.wheel(&["import", text(&folder.join(archive)), name]);
        assert_eq!(digest(&home.live_disk(name)), live, "{archive}");
    }
    let (status, said) = home.check();
    assert_eq!(status, 0, "{said}");
}
