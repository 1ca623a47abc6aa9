//! Results that are returned at once, without a task. With `sandbox:failed`, nothing is found.

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};

use super::endpoints::Output;
use super::files::IMAGE;
use super::task_view::TaskView;

/// Kinds of segments that `image-recognize` looks for.
const SEGMENTS: [&str; 4] = ["object_seg", "head_seg", "face_seg", "cloth_seg"];

/// Width and height of the video, frames per second, and number of frames.
const FRAMES: (u32, u32, u32, u32) = (320, 180, 12, 24);

/// Empty mask of such a frame, as COCO encodes run lengths: one run of 320 times 180.
const EMPTY_MASK: &str = "PXh1";

// === impl TaskView ===

impl TaskView<'_> {
    pub(super) fn answer(&self) -> Value {
        let mut answer = match self.task.endpoint.output {
            Output::Speech => return self.legacy(),
            Output::Faces => self.faces(),
            Output::Segments => self.segments(),
            _ => self.selection(),
        };
        self.add_deduction(&mut answer);
        answer
    }

    fn faces(&self) -> Value {
        let face = json!({
            "face_id": "0",
            "face_image": self.file("-0.png"),
            "start_time": 0,
            "end_time": 2000,
        });
        let faces = if self.task.fails() {
            vec![]
        } else {
            vec![face]
        };
        json!({ "session_id": self.product(), "face_data": faces })
    }

    fn segments(&self) -> Value {
        let segment = |(index, name)| {
            json!({
                "type": name,
                "is_contain": !self.task.fails(),
                "url": self.file(&format!("-{index}.png")),
            })
        };
        let segments: Value = SEGMENTS.iter().enumerate().map(segment).collect();
        json!({ "task_result": { "images": segments } })
    }

    /// Returns the result of a step that leads to a multi-elements task.
    fn selection(&self) -> Value {
        let (width, height, rate, frames) = FRAMES;
        let status = u8::from(self.task.fails());
        let mut answer = json!({ "status": status, "session_id": self.echo("session_id") });
        match self.task.endpoint.output {
            Output::Selection => {
                answer["session_id"] = json!(self.product());
                answer["fps"] = json!(f64::from(rate));
                answer["original_duration"] = json!(1000 * frames / rate);
                answer["width"] = json!(width);
                answer["height"] = json!(height);
                answer["total_frame"] = json!(frames);
                answer["normalized_video"] = json!(self.file(".mp4"));
            }
            Output::Mask => {
                let size = [height, width];
                let picture = BASE64_STANDARD.encode(IMAGE);
                let mask = json!({
                    "object_id": 0,
                    "rle_mask": { "size": size, "counts": EMPTY_MASK },
                    "png_mask": { "size": size, "base64": picture },
                });
                let index = self.echo("frame_index");
                answer["res"] = json!({ "frame_index": index, "rle_mask_list": [mask] });
            }
            Output::Preview => {
                answer["res"] = json!({
                    "video": self.file(".mp4"),
                    "video_cover": self.file("-0.png"),
                    "tracking_output": self.file(".mp4"),
                });
            }
            _ => {}
        }
        answer
    }
}
