// Score PNG images with ONNX Runtime in Node: node onnxruntime_node.mjs model.onnx image.png …
// RUNTIME=onnxruntime-web takes the build for browsers, which computes in WebAssembly.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const require = createRequire(process.cwd() + "/");
const { PNG } = require("pngjs");
const runtime = require(process.env.RUNTIME ?? "onnxruntime-node");

const [model, ...images] = process.argv.slice(2);
const session = await runtime.InferenceSession.create(readFileSync(model));
for (const path of images) {
  const { width, height, data } = PNG.sync.read(readFileSync(path)); // red, green, blue, alpha
  const pixels = width * height;
  const values = new Float32Array(3 * pixels);
  for (let pixel = 0; pixel < pixels; pixel++) {
    for (let channel = 0; channel < 3; channel++) {
      values[channel * pixels + pixel] = data[4 * pixel + channel] / 255;
    }
  }
  const input = new runtime.Tensor("float32", values, [1, 3, height, width]);
  const result = await session.run({ input }, ["pred_score", "pred_label"]);
  const decision = result.pred_label.data[0] ? "anomalous" : "good";
  console.log(path, result.pred_score.data[0].toFixed(6), decision);
}
