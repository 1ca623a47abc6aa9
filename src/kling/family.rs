//! The family table: one row for each kind of task that Kling can make.
//!
//! A row says which requests make such a task, which read it, and what the task takes from the account.
//! The paths are those of the vendor's pages of 2026-09-20. A row that is marked as a guess has a pool that
//! no public source confirms; a wrong guess costs nothing but a refused create, which is free.

/// One kind of task: the requests that make it and read it.
#[derive(Debug, PartialEq, Eq)]
pub struct Family {
    /// Path of the create, without a leading `/v1`. A last segment `*` stands for the name of a model.
    path: &'static [&'static str],
    /// Pack type whose slots the task holds; `None` if it makes neither a video nor an image.
    pub pool: Option<Pool>,
    /// Rule for the number of slots.
    pub weight: Weight,
    /// Place of the external id in the body of the create.
    pub external_id: ExternalIdPlace,
    /// Request that reads one task.
    pub query: TypedQuery,
}

/// Pack type of an account. Each has slots of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pool {
    Video,
    Image,
}

/// Rule for the number of slots that a task holds from its create to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// One slot, whatever the task makes.
    One,
    /// As many slots as the request asks for images (`n`, or the length of a series).
    Images,
}

/// Place of the external id in a create, and of its echo in the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExternalIdPlace {
    /// `external_task_id` at the top of the body; the echo is `data.task_info.external_task_id`.
    Top,
    /// `options.external_task_id`; the echo is `data.external_id`.
    Options,
}

/// Request that reads one task of a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TypedQuery {
    /// `GET` of the create's path with the task id or the external id as a further segment.
    Path,
    /// As [`Path`](Self::Path), but with the task id only.
    PathById,
    /// `GET /tasks` with `task_ids=` or `external_task_ids=`, 20 ids at most.
    Tasks,
    /// `GET /solutions` with `task_ids=` or `external_task_ids=`, 20 ids at most.
    Solutions,
}

/// A request that reads tasks, as far as its target shows it.
#[derive(Debug, PartialEq, Eq)]
pub enum TaskRead<'a> {
    /// Reads one task by the id in the path: a task id or an external id.
    ByPath(&'a str),
    /// Reads the tasks with the ids in the query, separated by commas.
    ByQuery(&'a str),
    /// Reads a page of a list.
    List,
}

const VIDEO: Option<Pool> = Some(Pool::Video);
const IMAGE: Option<Pool> = Some(Pool::Image);

/// All families. The most used ones come first: a search for an unknown id asks in this order.
pub const FAMILIES: [Family; 31] = {
    use ExternalIdPlace::{Options, Top};
    use TypedQuery::{Path, PathById, Solutions, Tasks};
    use Weight::{Images, One};
    [
        row(&["videos", "text2video"], VIDEO, One, Top, Path),
        row(&["videos", "image2video"], VIDEO, One, Top, Path),
        row(&["images", "generations"], IMAGE, Images, Top, Path),
        row(&["videos", "omni-video"], VIDEO, One, Top, Path),
        row(&["images", "omni-image"], IMAGE, Images, Top, Path),
        row(&["videos", "multi-image2video"], VIDEO, One, Top, Path),
        row(&["videos", "motion-control"], VIDEO, One, Top, Path),
        row(&["images", "kolors-virtual-try-on"], IMAGE, One, Top, Path),
        row(&["videos", "lip-sync"], VIDEO, One, Top, Path),
        row(&["videos", "advanced-lip-sync"], VIDEO, One, Top, PathById),
        row(&["videos", "avatar", "image2video"], VIDEO, One, Top, Path),
        row(&["videos", "video-extend"], VIDEO, One, Top, Path),
        row(&["videos", "effects"], VIDEO, One, Top, Path),
        row(&["videos", "multi-elements"], VIDEO, One, Top, Path),
        row(&["images", "multi-image2image"], IMAGE, Images, Top, Path),
        row(&["images", "editing", "expand"], IMAGE, Images, Top, Path),
        row(&["general", "ai-multi-shot"], IMAGE, One, Top, Path), // a guess
        row(
            &["general", "advanced-custom-elements"],
            None,
            One,
            Top,
            Path,
        ),
        row(&["general", "custom-elements"], None, One, Top, Path),
        row(&["general", "custom-voices"], None, One, Top, Path),
        row(&["audio", "text-to-audio"], None, One, Top, Path),
        row(&["audio", "video-to-audio"], None, One, Top, Path),
        row(&["text-to-video", "*"], VIDEO, One, Options, Tasks),
        row(&["image-to-video", "*"], VIDEO, One, Options, Tasks),
        row(&["omni-video", "*"], VIDEO, One, Options, Tasks),
        row(&["motion-control", "*"], VIDEO, One, Options, Tasks),
        row(
            &["solutions", "virtual_try_on"],
            IMAGE,
            One,
            Options,
            Solutions,
        ), // a guess, as all solutions
        row(
            &["solutions", "talking_agent"],
            VIDEO,
            One,
            Options,
            Solutions,
        ),
        row(
            &["solutions", "drama_subtitle"],
            VIDEO,
            One,
            Options,
            Solutions,
        ),
        row(
            &["solutions", "e-commerce", "goods_studio"],
            IMAGE,
            One,
            Options,
            Solutions,
        ),
        row(
            &["solutions", "e-commerce", "clothing_dupe"],
            IMAGE,
            One,
            Options,
            Solutions,
        ),
    ]
};

const fn row(
    path: &'static [&'static str],
    pool: Option<Pool>,
    weight: Weight,
    external_id: ExternalIdPlace,
    query: TypedQuery,
) -> Family {
    Family {
        path,
        pool,
        weight,
        external_id,
        query,
    }
}

// === impl Family ===

impl Family {
    /// Finds the family that a `POST` to this path makes a task of.
    pub fn of_create(path: &str) -> Option<&'static Self> {
        FAMILIES.iter().find(|family| family.rest(path) == Some(""))
    }

    /// Finds the family with this name, as [`name`](Self::name) returns it.
    pub fn named(name: &str) -> Option<&'static Self> {
        FAMILIES.iter().find(|family| family.name() == name)
    }

    /// Returns true if an id can stand in a target as it is: 1 to 64 letters, digits, `.`, `_` and `-`.
    pub fn is_plain_id(id: &str) -> bool {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        // Dots alone would name another folder.
        (1..=64).contains(&id.len())
            && id.bytes().all(is_plain)
            && id.bytes().any(|byte| byte != b'.')
    }

    /// Returns the model in the path of a create; `None` if the body names it.
    pub fn model<'a>(&self, path: &'a str) -> Option<&'a str> {
        let names_model = self.path.last() == Some(&"*");
        let last = path.trim_end_matches('/').rsplit('/').next();
        last.filter(|_| names_model)
    }

    /// Returns the name under which the store knows the family: its path.
    pub fn name(&self) -> String {
        self.path.join("/")
    }

    /// Returns the path of the create.
    pub fn path(&self) -> String {
        match self.query {
            TypedQuery::Path | TypedQuery::PathById => format!("/v1/{}", self.path.join("/")),
            TypedQuery::Tasks | TypedQuery::Solutions => format!("/{}", self.path.join("/")),
        }
    }

    /// Returns the target of the request that reads one task by its id at Kling.
    pub fn read_by_id(&self, id: &str) -> String {
        match self.query {
            TypedQuery::Path | TypedQuery::PathById => format!("/v1/{}/{id}", self.path.join("/")),
            TypedQuery::Tasks => format!("/tasks?task_ids={id}"),
            TypedQuery::Solutions => format!("/solutions?task_ids={id}"),
        }
    }

    /// Returns the target of the request that reads one task by its external id; `None` if there is no
    /// such request.
    pub fn read_by_external_id(&self, id: &str) -> Option<String> {
        Some(match self.query {
            TypedQuery::PathById => return None,
            TypedQuery::Path => format!("/v1/{}/{id}", self.path.join("/")),
            TypedQuery::Tasks => format!("/tasks?external_task_ids={id}"),
            TypedQuery::Solutions => format!("/solutions?external_task_ids={id}"),
        })
    }

    /// Returns the rest of a path behind the path of this family, without slashes around it.
    fn rest<'a>(&self, path: &'a str) -> Option<&'a str> {
        let mut rest = without_prefixes(path);
        for name in self.path {
            let (segment, behind) = rest.split_once('/').unwrap_or((rest, ""));
            if *name == "*" && segment.is_empty() || *name != "*" && segment != *name {
                return None;
            }
            rest = behind.trim_start_matches('/');
        }
        Some(rest.trim_end_matches('/'))
    }
}

// === impl TaskRead ===

impl<'a> TaskRead<'a> {
    /// Recognises a `GET` that reads tasks; `None` for any other target.
    pub fn of_get(path: &'a str, query: Option<&'a str>) -> Option<Self> {
        let plain = without_prefixes(path).trim_end_matches('/');
        if matches!(plain, "tasks" | "solutions") {
            let mut pairs = query?.split('&').filter_map(|pair| pair.split_once('='));
            let (_, ids) =
                pairs.find(|(name, _)| matches!(*name, "task_ids" | "external_task_ids"))?;
            return Some(Self::ByQuery(ids));
        }
        let legacy = FAMILIES
            .iter()
            .filter(|family| matches!(family.query, TypedQuery::Path | TypedQuery::PathById));
        // `videos/avatar` is no task of a family, but `videos/avatar/image2video` is a list.
        let mut rests = legacy.filter_map(|family| family.rest(path));
        match rests.find(|rest| !rest.contains('/'))? {
            "" => Some(Self::List),
            id => Some(Self::ByPath(id)),
        }
    }
}

impl TaskRead<'_> {
    /// Returns the plain target of a `GET` that reads exactly one task; `None` for any other.
    pub fn target_of_one(path: &str, query: Option<&str>) -> Option<String> {
        match TaskRead::of_get(path, query)? {
            TaskRead::ByPath(id) if query.is_none() && Family::is_plain_id(id) => {
                let family = FAMILIES.iter().find(|family| {
                    let is_read_by_path =
                        matches!(family.query, TypedQuery::Path | TypedQuery::PathById);
                    is_read_by_path && family.rest(path) == Some(id)
                })?;
                Some(family.read_by_id(id))
            }
            TaskRead::ByQuery(id) if Family::is_plain_id(id) => {
                let query = query.filter(|query| !query.contains('&'))?;
                let path = without_prefixes(path).trim_end_matches('/');
                Some(format!("/{path}?{query}"))
            }
            _ => None,
        }
    }
}

// === impl Pool ===

impl Pool {
    /// Returns the name of the pool in metrics and settings.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Video => "video",
            Self::Image => "image",
        }
    }

    /// Finds the pool with this name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::Video, Self::Image]
            .into_iter()
            .find(|pool| pool.as_str() == name)
    }
}

/// Removes leading slashes and the prefixes `/kling` and `/v1`, which clients add or leave out (`new-api`
/// sends `/kling/v1/…`, many base URLs end in `/v1`).
fn without_prefixes(path: &str) -> &str {
    let mut rest = path.trim_start_matches('/');
    for prefix in ["kling", "v1"] {
        if let Some(behind) = rest.strip_prefix(prefix)
            && behind.starts_with('/')
        {
            rest = behind.trim_start_matches('/');
        }
    }
    rest
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn create_is_found_under_the_paths_that_clients_use() {
        for (path, name) in [
            ("/v1/videos/text2video", Some("videos/text2video")),
            ("/v1/videos/text2video/", Some("videos/text2video")),
            ("//v1//videos//text2video", Some("videos/text2video")),
            ("/videos/text2video", Some("videos/text2video")),
            ("/kling/v1/videos/text2video", Some("videos/text2video")),
            ("/kling/videos/text2video", Some("videos/text2video")),
            (
                "/v1/videos/avatar/image2video",
                Some("videos/avatar/image2video"),
            ),
            ("/text-to-video/kling-3.0", Some("text-to-video/*")),
            (
                "/solutions/e-commerce/goods_studio",
                Some("solutions/e-commerce/goods_studio"),
            ),
            ("/text-to-video", None),
            ("/text-to-video/", None),
            ("/text-to-video/kling-3.0/x", None),
            ("/v1/videos/text2video/123", None),
            ("/v1/videos/multi-elements/init-selection", None),
            ("/v1/videos/identify-face", None),
            ("/v1/audio/tts", None),
            ("/v1videos/text2video", None),
            ("/v2/videos/text2video", None),
            ("/tasks", None),
            ("/", None),
            ("", None),
        ] {
            let found = Family::of_create(path).map(Family::name);
            assert_eq!(found.as_deref(), name, "{path}");
            let model = Family::of_create(path).and_then(|family| family.model(path));
            let named = name.is_some_and(|name| name.ends_with('*'));
            assert_eq!(model, named.then_some("kling-3.0"), "{path}");
        }
    }

    #[test]
    fn read_is_recognised_by_its_target() {
        use TaskRead::{ByPath, ByQuery, List};
        for (target, read) in [
            ("/v1/videos/text2video/8", Some(ByPath("8"))),
            ("/v1/images/kolors-virtual-try-on//8", Some(ByPath("8"))),
            ("/videos/text2video/8/", Some(ByPath("8"))),
            ("/v1/videos/avatar/image2video/8", Some(ByPath("8"))),
            ("/v1/videos/avatar/image2video", Some(List)),
            ("/v1/videos/text2video?pageNum=1", Some(List)),
            ("/tasks?task_ids=8", Some(ByQuery("8"))),
            ("/tasks?a=b&external_task_ids=mine", Some(ByQuery("mine"))),
            ("/tasks?task_ids=8,9", Some(ByQuery("8,9"))),
            ("/solutions?task_ids=8%2C9", Some(ByQuery("8%2C9"))),
            ("/tasks", None),
            ("/tasks?limit=1", None),
            ("/v1/videos/text2video/8/9", None),
            ("/v1/general/presets-voices", None),
            ("/account/costs", None),
        ] {
            let (path, query) = target.split_once('?').unwrap_or((target, ""));
            let query = (!query.is_empty()).then_some(query);
            assert_eq!(TaskRead::of_get(path, query), read, "{target}");
        }
    }

    #[test]
    fn one_task_has_one_target_however_it_is_spelled() {
        let video = Some("/v1/videos/text2video/8");
        for (target, plain) in [
            ("/v1/videos/text2video/8", video),
            ("//v1/videos//text2video/8/", video),
            ("/kling/videos/text2video/8", video),
            ("/v1/videos/text2video/8?a=1", None),
            ("/v1/videos/text2video", None),
            ("/v1/videos/text2video/%38", None),
            ("/tasks?task_ids=8", Some("/tasks?task_ids=8")),
            ("//tasks/?task_ids=8", Some("/tasks?task_ids=8")),
            (
                "/solutions?external_task_ids=a",
                Some("/solutions?external_task_ids=a"),
            ),
            ("/tasks?task_ids=8&a=1", None),
            ("/tasks?task_ids=8,9", None),
        ] {
            let (path, query) = target.split_once('?').unwrap_or((target, ""));
            let query = (!query.is_empty()).then_some(query);
            assert_eq!(
                TaskRead::target_of_one(path, query).as_deref(),
                plain,
                "{target}"
            );
        }
    }

    #[test]
    fn each_family_reads_what_it_makes() {
        let mut names = HashSet::new();
        for family in &FAMILIES {
            assert!(names.insert(family.name()));
            assert_eq!(Family::named(&family.name()), Some(family));
            let made = format!("/v1/{}", family.name().replace('*', "kling-3.0"));
            assert_eq!(Family::of_create(&made), Some(family), "{made}");
            let targets = [
                Some(family.read_by_id("8")),
                family.read_by_external_id("8"),
            ];
            for target in targets.into_iter().flatten() {
                let (path, query) = target.split_once('?').unwrap_or((&target, ""));
                let read = TaskRead::of_get(path, Some(query));
                let is_found = matches!(read, Some(TaskRead::ByPath("8") | TaskRead::ByQuery("8")));
                assert!(is_found, "{target}");
            }
        }
    }
}
