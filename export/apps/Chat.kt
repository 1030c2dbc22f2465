// A conversation with a bundle on Android: docs/phone_app.md. Never compiled here; names were read in public sources.

import ai.onnxruntime.genai.*
import java.io.File
import org.json.*

/** One conversation, for one background thread; stop() from any. */
class Chat(folder: File, private val context: Int = 2048, private val most: Int = 256) : AutoCloseable {
    init { GenAI.setTelemetry(false) }
    private val model = Model(folder.path)
    private val tokenizer = Tokenizer(model)
    private val template = File(folder, "chat_template.jinja").readText()
    private val ends = tokenizer.getEosTokenIds().toSet()
    private val messages = mutableListOf<JSONObject>()
    @Volatile private var stopped = false

    fun stop() { stopped = true }

    fun answer(text: String, piece: (String) -> Unit) {
        stopped = false
        messages += JSONObject().put("role", "user").put("content", text)
        while (encoded().size > context - most && messages.size > 2) repeat(2) { messages.removeAt(0) }
        val ids = encoded()
        val said = StringBuilder()
        GeneratorParams(model).use { params ->
            params.setSearchOption("max_length", (ids.size + most).toDouble())
            params.setSearchOption("do_sample", false)
            Generator(model, params).use { generator -> tokenizer.createStream().use { stream ->
                generator.appendTokens(ids)
                while (!generator.isDone() && !stopped) {
                    generator.generateNextToken()
                    val token = generator.getLastTokenInSequence(0)
                    if (token !in ends) stream.decode(token).let { said.append(it); piece(it) }
                }
            } }
        }
        messages += JSONObject().put("role", "assistant").put("content", said.toString())
    }

    private fun encoded(): IntArray =
        tokenizer.encode(tokenizer.applyChatTemplate(template, JSONArray(messages).toString(), null, true))
            .use { it.getSequence(0) }

    override fun close() { tokenizer.close(); model.close() }
}
